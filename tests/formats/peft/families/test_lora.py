"""Exchange LoRA's adapter directories with PEFT, in both directions."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import lightning_peft as lp
from tests.formats.models import (
    Attention,
    Called,
    Convolutions,
    Wrapped,
    adapted,
    llama,
    logits,
    made_by_peft,
    read_by_peft,
    tokens,
)


@pytest.mark.parametrize("method", [lp.LoRA, lp.DoRA])
def test_peft_reads_ours_and_we_read_theirs(method, tmp_path):
    base, x = llama(), tokens()
    ours = adapted(base, method(r=4, alpha=7, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}))
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-2)
    lp.save_adapter(ours, tmp_path / "ours")
    theirs = read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, x), logits(ours, x))

    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    assert lp.load_adapter(again, tmp_path / "theirs") == ["default"]
    torch.testing.assert_close(logits(again, x), logits(ours, x))


def test_an_adapter_made_by_peft_computes_the_same_here(tmp_path):
    base, x = llama(), tokens()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj", "up_proj"], use_rslora=True)
    theirs = made_by_peft(base, config, tmp_path)
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x))


def test_keys_do_not_contain_the_name_in_a_lightning_module(tmp_path):
    base, x = llama(), tokens()
    ours = adapted(Called(base), lp.LoRA(r=2, targets=["q_proj"]))
    lp.save_adapter(ours, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path), x), logits(ours, x))
    other = Wrapped(copy.deepcopy(base)).eval()
    lp.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other, x), logits(ours, x))


def test_a_loaded_adapter_is_frozen_and_inactive_next_to_others(tmp_path):
    base, x = llama(), tokens()
    first = adapted(base, lp.LoRA(r=2, targets=["q_proj"]))
    lp.save_adapter(first, tmp_path)
    model = adapted(base, lp.LoRA(r=2, targets=["v_proj"], name="mine"))
    before, trains = logits(model, x), lp.trainable_parameters(model)
    lp.load_adapter(model, tmp_path, name="theirs")
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=0)
    assert {id(p) for p in lp.trainable_parameters(model)} == {id(p) for p in trains}
    lp.set_active(model, "theirs")
    torch.testing.assert_close(logits(model, x), logits(first, x))


def test_a_rank_above_both_sides_of_a_matrix(tmp_path):
    base, x = Convolutions().eval(), tokens()
    config = peft.LoraConfig(r=20, target_modules=["conv2", "conv3", "inner.head"])
    theirs = made_by_peft(base, config, tmp_path)
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (lp.LoRA(r=2, targets=["conv1"]), "dilation"),
        (lp.DoRA(r=2, targets=["attn"]), "does not support DoRA"),
    ],
)
def test_layers_that_peft_cannot_run_are_saved_natively(method, said, tmp_path):
    base, x = (Convolutions() if said == "dilation" else Attention()).eval(), tokens()
    if said == "dilation":
        base.conv1.dilation, base.conv1.padding = (2,), (2,)
    ours = adapted(base, method)
    lp.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LIGHTNING_PEFT"
    assert said in config["reason"]
    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x), rtol=0, atol=0)
