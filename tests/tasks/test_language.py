"""LanguageModel: causal and masked, and the folder it exports."""

import json
import math

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import demo
from lightning_peft.data import GenerationData, LanguageModelData
from lightning_peft.tasks import LanguageModel, TextClassifier

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 1,
}


def test_objective_is_what_the_configuration_names(gpt2):
    assert LanguageModel("demo").objective == "masked"
    assert LanguageModel(gpt2).objective == "causal"


def test_unnamed_objective_is_asked_for(tmp_path):
    config = json.loads((demo.MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match=r"no architecture.*pass objective='causal' or objective='masked'"):
        LanguageModel(str(tmp_path))


def test_causal_training_lowers_the_loss(gpt2):
    L.seed_everything(0)
    module = LanguageModel(gpt2, lr=1e-2)
    data = LanguageModelData("demo", batch_size=8, block_size=32)
    trainer = L.Trainer(max_steps=15, **QUIET)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"] < math.log(4096) - 1


def test_masked_model_wants_masked_data_and_causal_does_not(gpt2, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text\nopen a file\nread a line\n")
    with pytest.raises(ValueError, match=r"objective is 'masked' and the data has mask=None: pass mask=0.15"):
        L.Trainer(max_steps=1, **QUIET).fit(LanguageModel("demo"), LanguageModelData(str(texts)))
    with pytest.raises(ValueError, match=r"objective is 'causal' and the data has mask=0.2: pass mask=None"):
        L.Trainer(max_steps=1, **QUIET).fit(LanguageModel(gpt2), LanguageModelData(str(texts), mask=0.2))


def test_fast_dev_run_exports_nothing(tmp_path):
    module = LanguageModel("demo", export_dir=str(tmp_path / "out"))
    L.Trainer(**{**QUIET, "fast_dev_run": True}).fit(module, LanguageModelData("demo", mask=0.3, batch_size=2))
    assert not (tmp_path / "out").exists()


def test_fit_exports_a_folder_that_loads_again(tmp_path):
    module = LanguageModel("demo", export_dir=str(tmp_path / "out"), export_dtype="float16")
    trainer = L.Trainer(max_steps=2, **QUIET)
    trainer.fit(module, LanguageModelData("demo", mask=0.3, batch_size=2))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    parameters = sum(p.numel() for p in module.model.parameters())
    assert sum(tensor.numel() for tensor in stored.values()) == parameters, "tied weights are stored once"
    again = LanguageModel(str(tmp_path / "out"))
    for name, parameter in again.model.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, module.model.get_parameter(name), atol=1e-3, rtol=1e-3)
    assert TextClassifier(str(tmp_path / "out")).num_labels == 17


def test_loss_is_the_mean_over_predicted_tokens(gpt2, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,target\nread a file,x\nwrite,one two three four five six seven eight nine ten\n")
    module = LanguageModel(gpt2).eval()
    data = GenerationData(str(path), str(path), batch_size=1, tokenizer="demo")
    logged = L.Trainer(**QUIET | {"limit_val_batches": 1.0}).validate(module, data, verbose=False)[0]["val/loss"]
    data.batch_size = 2
    with torch.no_grad():
        batch = next(iter(data.val_dataloader()))
        assert logged == pytest.approx(module.model(**batch).loss.item(), rel=1e-5)


def test_pairs_are_for_causal_models(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,target\na,b\n")
    with pytest.raises(ValueError, match=r"GenerationData is for models whose objective is 'causal'; this one's is"):
        L.Trainer(max_steps=1, **QUIET).fit(LanguageModel("demo", pretrained=False), GenerationData(str(path)))


def test_generates_the_same_alone_and_in_a_batch(gpt2):
    torch.manual_seed(0)
    module = LanguageModel(gpt2, pretrained=False)
    prompts = ["open a file and read it", "sockets"]
    options = {"max_new_tokens": 5, "suppress_tokens": [0, 1, 2, 3, 4]}  # the special tokens
    both = module.generate(prompts, **options)
    assert both == [module.generate([prompt], **options)[0] for prompt in prompts]
    assert all(both)
    assert module.training
    with pytest.raises(ValueError, match="needs objective='causal'"):
        LanguageModel("demo", pretrained=False).generate(["a"])
