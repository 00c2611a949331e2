"""Test that ``lp.reset`` restores everything that training changed, bit for bit."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import assert_same_bits, bits
from tests.kinds import KINDS, Kind
from tests.table import METHODS


def trained(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> nn.Module:
    optimizer = torch.optim.SGD(lp.trainable_parameters(model), lr=0.1)
    model.train()
    for _ in range(2):
        model(*batch).square().mean().backward()
        optimizer.step()
    return model


def adapted_somewhere(row: str) -> tuple[Kind, nn.Module]:
    """The method on the first kind of model that it works on."""
    for kind in map(KINDS.__getitem__, ("linear", "resnet", "llama", "vit")):
        model = kind.build()
        with suppress(lp.TargetError, lp.InjectionError):
            lp.apply(model, METHODS[row].make(kind))
            return kind, model
    raise AssertionError(row)


@pytest.mark.parametrize("row", METHODS)
def test_every_method_starts_again(row: str):
    kind, model = adapted_somewhere(row)
    before = bits(model)
    with torch.no_grad():
        for key in lp.adapter_state(model):
            value = model.state_dict()[key]
            value.add_(torch.ones_like(value))
    model.zero_grad()
    if isinstance(METHODS[row].make(kind), lp.FullFineTuning):
        with pytest.raises(lp.StateError, match="more than half of the base"):
            lp.reset(model)
        model.load_state_dict(before)  # do what the error says
    lp.reset(model)
    assert_same_bits(bits(model), before)


def test_heads_statistics_and_gradients_go_back_too():
    kind = KINDS["resnet"]
    model = kind.build()
    lp.apply(model, lp.LoRA(r=2, targets=["stem"], trainable=["fc"], train_norm_stats=True))
    before = bits(model)
    trained(model, kind.batch())
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items() if "running_mean" in k)
    trains = [p.requires_grad for p in model.parameters()]
    lp.reset(model)
    assert_same_bits(bits(model), before)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)


def test_a_failed_reset_names_the_values_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    base = copy.deepcopy(model.state_dict())
    lp.apply(model, lp.LoRA(r=2, targets=["0"]))
    start = bits(model)
    model[1].weight.data.add_(1)
    model[0].adapters["default"].lora_B.data.add_(1)
    before = bits(model)
    with pytest.raises(lp.StateError, match=r"restore 1\.weight"):
        lp.reset(model)
    assert_same_bits(bits(model), before)
    model.load_state_dict(base, strict=False)
    lp.reset(model)
    assert_same_bits(bits(model), start)


def test_a_model_without_methods_and_a_merged_one_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no methods"):
        lp.reset(model)
    lp.apply(model, lp.LoRA(r=2))
    lp.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        lp.reset(model)
