"""Export directories from checkpoints without the model, import directories as checkpoints, and both commands."""

import copy
import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.formats.checkpoint import export_checkpoint
from lightning_peft.formats.directory.files import read_files
from tests.formats import models
from tests.formats.models import logits, read_by_peft, tokens


class Trained(L.LightningModule):
    """One of the small models, built from a seed, so that its base is always the same."""

    def __init__(self, model: str = "bert", seed: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.net = getattr(models, model)()

    def forward(self, x):
        out = self.net(x)
        return getattr(out, "logits", out)

    def training_step(self, batch, index):
        loss = self(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(lp.trainable_parameters(self), lr=0.05)


def train(module, *methods, ckpt_path=None, steps=2):
    saver = L.pytorch.callbacks.ModelCheckpoint(monitor="loss", filename="run")
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    trainer = L.Trainer(max_steps=steps, callbacks=[*methods, saver], **options)
    trainer.fit(module, DataLoader(tokens(), 2), ckpt_path=ckpt_path)
    return saver.best_model_path


CASES = {
    "bert": [{"targets": ["query", "word_embeddings"], "trainable": ["classifier"], "bias": "lora_only"}],
    "gpt2": [{"targets": ["c_attn"], "trainable_tokens": [3, 7]}],
    "Convolutions": [{"targets": ["conv1", "conv2", "grouped", "conv3", "emb"]}],
    "Attention": [{"targets": ["attn", "fc"], "init": "pissa"}],
    "Experts": [{"targets": ["layers.0.up", "layers.1.down", "layers.1.gate", "fc"]}],
    "llama": [{"targets": ["q_proj"], "name": "a"}, {"targets": ["v_proj"], "use_rslora": True, "name": "b"}],
}


@pytest.mark.parametrize("model", CASES)
def test_a_checkpoint_alone_makes_the_directory_that_the_model_makes(model, tmp_path):
    path = train(Trained(model), *(lp.LoRA(r=2, **options) for options in CASES[model]))
    names = export_checkpoint(path, tmp_path / "alone")
    module = lp.load_from_checkpoint(Trained, path)
    assert lp.save_adapter(module, tmp_path / "model") == names
    files = [p.relative_to(tmp_path / "model") for p in (tmp_path / "model").rglob("*.*") if p.suffix != ".md"]
    assert len(files) == 2 * len(names)
    for file in files:
        alone, there = tmp_path / "alone" / file, tmp_path / "model" / file
        if file.suffix == ".json":
            assert json.loads(alone.read_text()) == json.loads(there.read_text())
        else:
            alone, there = (read_files(f.parent).tensors for f in (alone, there))
            assert alone.keys() == there.keys()
            assert all(torch.equal(alone[key], there[key]) for key in there)


def test_the_card_tells_the_run(tmp_path):
    path = train(Trained(), lp.LoRA(r=2, targets=["query"], trainable=["classifier"]))
    export_checkpoint(path, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "`loss`" in card
    assert "lp.load_adapter" in card
    assert "PeftModel.from_pretrained" in card


def test_export_and_import_commands(tmp_path, capsys):
    x = tokens()
    path = train(Trained(), lp.LoRA(r=2, targets=["query"], trainable=["classifier"]))
    want = logits(lp.load_from_checkpoint(Trained, path).eval(), x)
    main(["export", path, str(tmp_path / "out")])
    main(["export", path, str(tmp_path / "same"), "--model", f"{__name__}.Trained", "--fold-scale"])
    base = Trained().net.eval()
    for folder in ("out", "same"):
        torch.testing.assert_close(logits(read_by_peft(base, tmp_path / folder), x), want)

    made = str(tmp_path / "made.ckpt")
    main(["import", str(tmp_path / "out"), made, "--model", f"{__name__}.Trained", "--model.model=bert"])
    again = lp.load_from_checkpoint(Trained, made)
    torch.testing.assert_close(logits(again.eval(), x), want)
    module = Trained()
    train(module, lp.LoRA(r=2, targets=["query"], trainable=["classifier"]), ckpt_path=made, steps=1)
    assert not torch.equal(
        module.net.classifier.weight, again.net.classifier.weight
    )  # it continues training from there
    torch.testing.assert_close(module.net.classifier.weight, again.net.classifier.weight, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["import", "{out}", "x.ckpt", "--model", "nowhere.Module"], "--model nowhere.Module"),
        (["import", "{out}", "x.ckpt", "--model", "{here}.Trained", "--model.seed", "4"], "different base"),
        (["export", "{ckpt}", "x", "--name", "other"], "no adapter named 'other'"),
        (["import", "{out}/none", "x.ckpt", "--model", "{here}.Trained"], "no directory"),
    ],
)
def test_commands_report_errors_in_one_line(args, said, tmp_path):
    path = train(Trained(), lp.LoRA(r=2, targets=["query"]))
    export_checkpoint(path, tmp_path / "out")
    with pytest.raises(SystemExit, match=said):
        main([a.format(out=tmp_path / "out", ckpt=path, here=__name__) for a in args])


def test_training_another_adapter_does_not_change_a_loaded_one(tmp_path):
    base, x = Trained().net, tokens()
    first = models.adapted(base, lp.LoRA(r=2, targets=["query"], trainable=["classifier"]))
    lp.save_adapter(first, tmp_path)
    module = Trained()
    lp.load_adapter(module, tmp_path, name="first")
    train(module, lp.LoRA(r=2, targets=["value"], name="second"))
    lp.set_active(module, "first")
    torch.testing.assert_close(logits(module.eval(), x), logits(first, x))
    assert isinstance(copy.deepcopy(module), nn.Module)


SEQUENCES = [lp.PromptTuning(3), lp.PrefixTuning(3, shift_positions=True), lp.PTuning(3)]


@pytest.mark.parametrize("method", SEQUENCES, ids=lambda m: type(m).__name__)
def test_exporting_a_prompt_asks_for_the_model(method, tmp_path):
    path = train(Trained("llama"), method)
    with pytest.raises(lp.FormatError, match="pass --model"):
        export_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


#: once loaded, everything that this trains of the base is an override
LOADED = {"r": 2, "targets": ["query"], "trainable": ["classifier"], "bias": "lora_only"}


@pytest.fixture
def loaded(tmp_path):
    """A function that builds a new module with the same trainable adapter, loaded from a directory."""
    lp.save_adapter(models.adapted(Trained().net, lp.LoRA(**LOADED)), tmp_path / "start")

    def build():
        module = Trained()
        lp.load_adapter(module, tmp_path / "start", trainable=True)
        return module

    return build


def test_training_a_loaded_adapter_is_saved_loaded_and_exported(loaded, tmp_path):
    module, x = loaded(), tokens()
    before = logits(module.eval(), x)
    path = train(module)
    want = logits(module.eval(), x)
    assert not torch.allclose(want, before, atol=1e-3)
    assert torch.equal(
        module.net.classifier.weight, Trained().net.classifier.weight
    )  # the base's own value is unchanged
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(".adapters.default." in key for key in state)
    again = lp.load_from_checkpoint(Trained, path)
    assert torch.equal(logits(again.eval(), x), want)
    assert len(lp.trainable_parameters(again)) == len(lp.trainable_parameters(module))
    export_checkpoint(path, tmp_path / "alone")
    lp.save_adapter(module, tmp_path / "model")
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("alone", "model")]
    assert configs[0] == configs[1]
    assert configs[0]["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(logits(read_by_peft(Trained().net.eval(), tmp_path / "alone"), x), want)


def test_training_a_loaded_adapter_resumes_exactly(loaded):
    x, unbroken = tokens(), loaded()  # the same seed determines the module and its data
    train(unbroken, steps=4)
    path = train(loaded())
    resumed = loaded()
    train(resumed, ckpt_path=path, steps=4)
    assert torch.equal(logits(resumed.eval(), x), logits(unbroken.eval(), x))


def test_a_loaded_checkpoint_trains_and_tests_without_its_method(loaded):
    path = train(Trained(), lp.LoRA(**LOADED))
    module, x = lp.load_from_checkpoint(Trained, path), tokens()
    before = logits(module.eval(), x)
    train(module)
    assert not torch.allclose(logits(module.eval(), x), before, atol=1e-3)


def test_methods_and_loaded_adapters_do_not_resume_each_other(loaded):
    path = train(loaded())
    with pytest.raises(lp.StateError, match=r"'default' was attached by lp.load_adapter.*but as a method in this run"):
        train(Trained(), lp.LoRA(**LOADED), ckpt_path=path)
    path = train(Trained(), lp.LoRA(**LOADED))
    with pytest.raises(lp.StateError, match=r"'default' was attached as a method .*but by lp.load_adapter"):
        train(loaded(), ckpt_path=path)
