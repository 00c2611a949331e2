"""``lp.status``: which methods are on a model, and which are active, merged or trainable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp


def test_status_follows_what_is_done_to_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert lp.status(model).adapters == ()
    lp.apply(model, lp.LoRA(r=2, targets=["0"], trainable=["2"]), lp.BitFit(name="biases"))
    lora, biases = lp.status(model).adapters
    assert (lora.name, lora.method, lora.active, lora.merged, lora.modules) == ("default", "LoRA", True, False, 1)
    assert lora.trainable == 2 * (8 + 8) + 8 * 2 + 2
    assert biases.method == "BitFit"
    assert biases.trainable == sum(p.numel() for n, p in model.named_parameters() if n == "0.bias" or n == "2.bias")
    assert lp.status(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with lp.disabled(model):
        assert not lp.status(model).adapters[0].active
    lp.merge(model)
    assert lp.status(model).adapters[0].merged
    lp.unmerge(model)
    assert not lp.status(model).adapters[0].merged
    assert "LoRA" in str(lp.status(model))
    lp.unload(model)
    assert lp.status(model).adapters == ()


def test_merging_a_plain_model_is_an_error():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(lp.MergeError, match=r"Linear has no adapters, so there is nothing to merge.*lp.load_adapter"):
        lp.merge(model)
    assert torch.equal(model.weight, before)
