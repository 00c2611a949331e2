"""The task type of a loaded file is written again, even if it is null."""

from __future__ import annotations

import json

import peft
import pytest

import lightning_peft as lp
from lightning_peft.formats.checkpoint import export_checkpoint
from tests.formats.models import llama, made_by_peft
from tests.formats.test_checkpoint import Trained, train


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_it_is_kept(task, tmp_path):
    base = llama()
    made_by_peft(base, peft.LoraConfig(target_modules=["q_proj"], task_type=task), tmp_path / "theirs")
    lp.load_adapter(base, tmp_path / "theirs", trainable=True)
    lp.save_adapter(base, tmp_path / "ours")
    assert _task(tmp_path / "ours") == task


def test_it_is_kept_through_a_checkpoint(tmp_path):
    base = llama()
    made_by_peft(base, peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "theirs")
    module = Trained("llama")
    lp.load_adapter(module, tmp_path / "theirs", trainable=True)
    export_checkpoint(train(module), tmp_path / "ours")
    assert _task(tmp_path / "ours") is None


def test_a_new_adapter_has_the_task_type_of_its_model(tmp_path):
    lp.apply(base := llama(), lp.LoRA(r=2))
    lp.save_adapter(base, tmp_path)
    assert _task(tmp_path) == "CAUSAL_LM"


def _task(folder):
    return json.loads((folder / "adapter_config.json").read_text())["task_type"]
