"""Quantised and packed weights are refused by name before anything changes; complex ones are not quantised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.trainer.module import _check_precision
from tests.helpers import close, perturb


class Encoded(nn.Parameter):
    """A tensor subclass, as libraries of quantisation have them."""


class Packed(nn.Module):
    """A layer in place of a linear one, with its weight in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 8))

    def forward(self, x):
        return x


def _with(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8), nn.Linear(8, 2))


def _stored(value) -> nn.Sequential:
    model = _with(nn.Linear(8, 8))
    model[1].weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    return model


CASES = {
    "int8": (lambda: _stored(torch.zeros(8, 8, dtype=torch.int8)), "'1' is stored as torch.int8"),
    "nf4": (lambda: _stored(torch.zeros(32, 1, dtype=torch.uint8)), "'1' is stored as torch.uint8"),
    "fp8": (lambda: _stored(torch.zeros(8, 8).to(torch.float8_e4m3fn)), "'1' is stored as torch.float8_e4m3fn"),
    "subclass": (lambda: _stored(Encoded(torch.zeros(8, 8))), "'1' is a .*Encoded, a tensor subclass"),
}


@pytest.mark.parametrize("make", [lp.LoRA, lp.IA3, lp.OFT, lp.SSF, lp.DoRA], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("model", "message"), CASES.values(), ids=CASES)
def test_quantised_weights_are_refused_by_name(model, message, make):
    model = model()
    options = {"feedforward_targets": ()} if make is lp.IA3 else {}
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(lp.TargetError, match=message):
        lp.apply(model, make(targets=["0", "1"], **options))
    assert [p.requires_grad for p in model.parameters()] == trained
    lp.apply(model, make(targets=["0", "2"], **options))


@pytest.mark.parametrize(
    "layer",
    [Packed, lambda: torch.ao.nn.quantized.dynamic.Linear(8, 8)],
    ids=["packed", "torch's"],
)
def test_layers_put_in_place_of_linear_ones(layer):
    model = _with(layer())
    with pytest.raises(lp.TargetError, match=r"'all-linear': 1 \(.*\) hold quantised or packed weights"):
        lp.apply(model, lp.LoRA())
    with pytest.raises(lp.TargetError, match=r"'1' matches '1' \(.*\), whose weight is quantised"):
        lp.apply(model, lp.LoRA(targets=["1"]))
    lp.apply(model, lp.LoRA(targets=["0", "2"]))


def test_a_quantised_head_cannot_train():
    model = _stored(torch.zeros(8, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"'1' cannot train, because it is stored as torch.int8"):
        lp.apply(model, lp.LoRA(targets=["0"], trainable=["1"]))


def test_complex_weights_are_adapted_and_merged():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.cfloat) for _ in range(2)))
    x = torch.randn(3, 4, dtype=torch.cfloat)
    lp.apply(model, lp.LoRA(r=2, targets="type:Linear"))
    perturb(model)
    expected = model(x)
    stored = model[0].weight.clone()
    lp.merge(model)
    close(model(x), expected)
    lp.unmerge(model)
    assert torch.equal(model[0].weight, stored)


def test_a_precision_that_replaces_layers_is_refused():
    plugin = type("BitsandbytesPrecision", (), {})()
    with pytest.raises(Exception, match="BitsandbytesPrecision is not supported"):
        _check_precision(type("Trainer", (), {"precision_plugin": plugin})())
