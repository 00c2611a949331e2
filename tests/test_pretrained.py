"""Finding a model, and the errors when it is not found."""

import subprocess
import sys

import pytest
import torch

from lightning_peft import demo
from lightning_peft.pretrained import load_model, load_tokenizer, locate
from lightning_peft.tasks import TextClassifier


def test_locate_demo_folder_and_hub_id(gpt2):
    assert locate("demo") == str(demo.MODEL)
    assert locate(gpt2) == gpt2
    assert locate("org/name") == "org/name"


def test_missing_folder_names_its_neighbour(tmp_path):
    (tmp_path / "bert-small").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no model folder .*bert-smal'; near it: bert-small"):
        locate(str(tmp_path / "bert-smal"))


def test_folder_above_the_model_names_the_right_one(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no config\.json; its folder 'checkpoint' has one"):
        locate(str(tmp_path))


def test_dtype_is_checked_and_kept():
    from transformers import AutoModelForMaskedLM

    with pytest.raises(ValueError, match="dtype='fp8' is not a torch dtype"):
        load_model(AutoModelForMaskedLM, "demo", True, "fp8")
    model = load_model(AutoModelForMaskedLM, "demo", True, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_tokenizer_wraps_a_text_in_its_special_tokens():
    tokenizer = load_tokenizer("demo")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Open a file")["input_ids"])
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert tokenizer.decode(tokenizer("Open a FILE.")["input_ids"], skip_special_tokens=True).strip() == "open a file."


def test_tasks_and_data_import_without_transformers_and_datasets():
    code = (
        "import sys, lightning\n"  # which imports transformers itself, where it is installed
        "sys.modules['transformers'] = sys.modules['datasets'] = None\n"
        "import lightning_peft.tasks, lightning_peft.data\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bias_that_the_configuration_adds_does_not_make_its_module_a_fresh_one():
    module = TextClassifier("demo", config={"attention_bias": True, "mlp_bias": True, "norm_bias": True})
    assert module.fresh_modules == TextClassifier("demo").fresh_modules == ["model.classifier"]
