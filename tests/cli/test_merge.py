"""``lightning-peft merge``: the merged model gives the adapted model's outputs, and loads without this package."""

from __future__ import annotations

import json
from pathlib import Path

import console
import lightning as L
import pytest
import torch
from modules import Data, Module
from safetensors.torch import load_file
from torch import nn

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.core.record import injection_state
from lightning_peft.tasks import TextClassifier
from tests.helpers import perturb
from tests.methods import tiny

HERE = Path(__file__).parent
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _user_path(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def run(*args: str) -> str:
    return console.run("merge", *args)


def checkpoint(module: L.LightningModule, *methods: lp.PEFTMethod, scale: float = 0.15) -> Path:
    """The checkpoint of a run with these methods, and the trained module."""
    trainer = L.Trainer(callbacks=[*methods], max_epochs=1, enable_checkpointing=False, **QUIET)
    if isinstance(module, Module):
        trainer.fit(module, Data())
    else:
        trainer.strategy.connect(module)
        lp.apply(module, *methods)
        lp.trainer.module.adapt_module(module)
    perturb(module, scale=scale)
    if isinstance(module, Module):
        trainer.save_checkpoint("run.ckpt")
    else:
        _save(module)
    return Path("run.ckpt")


def _save(module: L.LightningModule) -> None:
    from lightning_peft.trainer.checkpoints.manifest import KEY, manifest

    saved = {"state_dict": lp.adapter_state(module), KEY: manifest(module), "hyper_parameters": dict(module.hparams)}
    saved["hyper_parameters"]["_class_path"] = f"{type(module).__module__}.{type(module).__name__}"
    torch.save({**saved, "pytorch-lightning_version": L.__version__}, "run.ckpt")


@torch.no_grad()
def output(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    found = model.eval()(*args, **kwargs)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("out", ["out", "deep/er/out.safetensors", "out.pt"])
def test_a_users_module_becomes_a_state_dict_with_its_own_keys(out: str):
    module = Module()
    checkpoint(module, lp.LoRA(r=4, trainable=["head"]))
    said = run("run.ckpt", out, "--model=modules.Module")
    assert said == f"merged default into {out}\n"
    file = Path(out) / "model.safetensors" if out == "out" else Path(out)
    state = torch.load(file, weights_only=True) if out.endswith("pt") else load_file(file)
    plain = Module()
    plain.load_state_dict(state)  # strict
    x = torch.randn(5, 16)
    torch.testing.assert_close(output(plain, x), output(module, x))
    assert not list(Path(out).parent.glob(".merge-*"))


def test_a_task_of_the_package_becomes_a_hugging_face_folder():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = TextClassifier("demo")
    checkpoint(module, lp.LoRA(r=4, targets="all-linear", trainable=["classifier"]))
    ids = torch.arange(12).view(2, 6) + 5
    expected = output(module, input_ids=ids, attention_mask=torch.ones_like(ids))
    run("run.ckpt", "out")
    plain, loading = AutoModelForSequenceClassification.from_pretrained("out", output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(output(plain, input_ids=ids), expected, rtol=1e-4, atol=1e-5)
    assert json.loads(Path("out/config.json").read_text())["architectures"] == [type(plain).__name__]
    assert not type(plain).__name__.startswith("Adapted")
    assert AutoTokenizer.from_pretrained("out")("hello")["input_ids"]


@pytest.mark.parametrize("source", ["run.ckpt", "adapter"])
def test_a_pipeline_answers_with_the_names_of_the_labels(source: str):
    from transformers import pipeline

    module = TextClassifier("demo", labels=["polite", "rude"])
    checkpoint(module, lp.LoRA(r=4, trainable=["classifier"]))
    lp.save_adapter(module, "adapter")  # its base is a masked language model that has its own 17 labels
    run(source, "out")
    [answer] = pipeline("text-classification", model="out")("please sit")
    assert answer["label"] in ("polite", "rude")


def test_saving_an_adapted_hugging_face_model_names_its_own_architecture(tmp_path: Path):
    model = tiny.bert()
    lp.apply(model, lp.LoRA(r=2), lp.PromptTuning(num_virtual_tokens=2, name="prompt"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def _saved_base(**options) -> nn.Module:
    model = tiny.llama(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained("base")
    return model


def test_an_adapter_directory_and_its_base_become_one_folder():
    from transformers import AutoModelForCausalLM

    model = _saved_base()
    lp.apply(model, lp.LoRA(r=2, targets=["q_proj", "down_proj"]))
    ids = torch.arange(12).view(2, 6) + 5
    expected = output(perturb(model), input_ids=ids)
    lp.save_adapter(model, "adapter")
    run("adapter", "out", "--base", "base")
    plain = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(output(plain, input_ids=ids), expected)
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_head_of_another_width_comes_with_its_adapter():
    from transformers import AutoModelForSequenceClassification

    base = tiny.bert()
    base.save_pretrained("base")
    wide = tiny.bert()
    wide.classifier, wide.config.num_labels = nn.Linear(32, 5), 5
    lp.apply(wide, lp.LoRA(r=2, targets=["query"], trainable=["classifier"]))
    lp.save_adapter(perturb(wide), "adapter")
    ids = torch.arange(12).view(2, 6) + 5
    run("adapter", "out", "--base", "base")
    plain = AutoModelForSequenceClassification.from_pretrained("out")
    assert plain.config.num_labels == 5
    torch.testing.assert_close(output(plain, input_ids=ids), output(wide, input_ids=ids))


@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head"])
def test_tied_weights_are_untied_where_that_is_asked_for(targets: str):
    from transformers import AutoModelForCausalLM

    model = _saved_base(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    lp.apply(model, lp.LoRA(r=2, targets=[targets, "q_proj"]))
    ids = torch.arange(12).view(2, 6) + 5
    expected = output(perturb(model), input_ids=ids)
    lp.save_adapter(model, "adapter")
    with pytest.raises(SystemExit, match=r"is the same tensor as .*untie"):
        run("adapter", "out", "--base", "base")
    assert not Path("out").exists()
    run("adapter", "out", "--base", "base", "--untie")
    plain = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(output(plain, input_ids=ids), expected)
    assert plain.config.tie_word_embeddings is False


def test_tied_weights_that_do_not_change_stay_tied():
    from transformers import AutoModelForCausalLM

    model = _saved_base(tie_word_embeddings=True)
    lp.apply(model, lp.LoRA(r=2, targets=["q_proj"]))
    lp.save_adapter(perturb(model), "adapter")
    run("adapter", "out", "--base", "base")
    plain = AutoModelForCausalLM.from_pretrained("out")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file("out/model.safetensors")


def test_one_of_several_adapters():
    module = Module()
    checkpoint(module, lp.LoRA(r=4, name="a"), lp.LoHa(r=2, name="b"))
    x = torch.randn(5, 16)
    with lp.active(module, "b"):
        expected = output(module, x)
    assert (
        run("run.ckpt", "out", "--model=modules.Module", "--name=b") == "merged b into out (a left out: not active)\n"
    )
    plain = Module()
    plain.load_state_dict(load_file("out/model.safetensors"))
    torch.testing.assert_close(output(plain, x), expected)


def test_parameters_that_a_selection_method_trained_are_in_the_merged_model():
    module = Module()
    checkpoint(module, lp.BitFit())
    run("run.ckpt", "out", "--model=modules.Module")
    state = load_file("out/model.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert list(injection_state(module).methods) == ["default"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.ckpt", "out"], r"does not name the class of the trained module: add --model"),
        (["run.ckpt", "out", "--model=modules.Modul"], r"--model modules.Modul: module 'modules' has no attribute"),
        (
            ["run.ckpt", "out", "--model=modules.Data"],
            r"modules.Data is not a LightningModule: pass my.package.Module, or one of",
        ),
        (["run.ckpt", "out", "--model=Module"], r"Module is not a LightningModule"),
        (["run.ckpt", "taken", "--model=modules.Module"], r"taken already exists: name a new folder or file"),
        (
            ["run.ckpt", "out", "--model=modules.Module", "--name=c"],
            r"no adapter named 'c'; run.ckpt has \['default'\]",
        ),
        (["gone.ckpt", "out", "--model=modules.Module"], r"there is no file gone.ckpt"),
        (["taken", "out"], r"taken has no adapter_config.json"),
        (["unnamed", "out"], r"unnamed does not name its base: add --base"),
    ],
)
def test_invalid_arguments_of_merge(arguments: list[str], message: str):
    checkpoint(Module(), lp.LoRA(r=4))
    Path("taken").mkdir()
    Path("taken/file").touch()
    Path("unnamed").mkdir()
    Path("unnamed/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(SystemExit, match=message):
        run(*arguments)
    assert not Path("out").exists()


def test_a_class_that_only_the_file_names_is_not_imported():
    module = Module()
    lp.apply(module, lp.LoRA(r=4))
    _save(module)
    saved = torch.load("run.ckpt", weights_only=True)
    saved["hyper_parameters"]["_class_path"] = "evil.Module"
    torch.save(saved, "run.ckpt")
    Path("evil.py").write_text("raise SystemError('was imported')")
    with pytest.raises(SystemExit, match=r"names the class evil.Module, but class names in files are never imported"):
        run("run.ckpt", "out")


def test_what_cannot_be_folded_is_named_and_nothing_is_written():
    module = Module()
    checkpoint(module, lp.LoRA(r=4, name="a"), lp.BottleneckAdapter(targets=["body.1"], bottleneck_size=4, name="b"))
    with pytest.raises(SystemExit, match=r"'b' at 'body.1' .* does not change weights"):
        run("run.ckpt", "out", "--model=modules.Module")
    assert not Path("out").exists()


def test_a_result_that_is_not_finite_is_refused():
    module = Module()
    checkpoint(module, lp.LoRA(r=4), scale=1e38)
    with pytest.raises(SystemExit, match=r"would hold NaN or infinity after the merge"):
        run("run.ckpt", "out", "--model=modules.Module")


def test_an_adapter_directory_is_merged_into_a_users_class():
    path = checkpoint(module := Module(16), lp.LoRA(r=2, trainable=["head"]))
    x = torch.randn(4, 16)
    expected = output(module, x)
    main(["export", str(path), "adapter"])
    run("adapter", "out.pt", "--model", "modules.Module", "--model.width=16")
    plain = Module(16)
    plain.load_state_dict(torch.load("out.pt", weights_only=True))
    torch.testing.assert_close(output(plain, x), expected)
    with pytest.raises(SystemExit, match="--base and --model both name"):
        run("adapter", "again.pt", "--model", "modules.Module", "--base", "demo")
    with pytest.raises(SystemExit, match=r"add --base path/to/base, or --model"):
        run("adapter", "again.pt")
