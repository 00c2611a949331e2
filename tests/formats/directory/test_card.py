"""The name of the base in a directory is public and never a local path."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

import lightning_peft as lp
from lightning_peft.pretrained import load_model, locate, public_name
from tests.formats.models import adapted, llama


def named(name, directory):
    """The card and the configuration of an adapter on a base with the given name."""
    base = llama()
    base.config._name_or_path = name
    lp.save_adapter(adapted(base, lp.LoRA(r=2, targets=["q_proj"])), directory)
    return (directory / "README.md").read_text(), json.loads((directory / "adapter_config.json").read_text())


def test_a_model_of_the_hub(tmp_path):
    card, config = named("org/llama", tmp_path)
    assert "base_model: org/llama\n" in card
    assert "# LoRA adapter for org/llama\n" in card
    assert config["base_model_name_or_path"] == "org/llama"


@pytest.mark.parametrize("path", ["/home/someone/models/llama", "~/llama", "./llama", "here/llama"])
def test_the_card_shows_only_the_last_part_of_a_local_path(path, tmp_path):
    Path("here/llama").mkdir(parents=True)
    card, config = named(path, tmp_path / "out")
    assert "| base | `llama` |" in card
    assert path not in card
    assert "base_model:" not in card
    assert config["base_model_name_or_path"] == path  # as Hugging Face PEFT writes it


def test_the_embedded_model_is_called_demo_wherever_it_is_installed(tmp_path):
    model = load_model(AutoModelForMaskedLM, "demo", False, None)
    model.config._name_or_path = locate("demo")
    lp.save_adapter(adapted(model, lp.LoRA(r=2, targets="all-linear")), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| base | `demo` |" in card
    assert locate("demo") not in card
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo"
    assert public_name("/elsewhere/site-packages/lightning_peft/demo/model") == "demo"
    assert public_name("my/demo/model") == "my/demo/model"
