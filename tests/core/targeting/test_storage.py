"""Weights that cannot be read as a matrix are refused by name before anything changes; complex ones are supported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import close, perturb


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
    "sparse": (lambda: _stored(torch.eye(8).to_sparse()), "'1' is stored as torch.sparse_coo, not as a dense tensor"),
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


def test_a_layer_that_rounds_its_input_and_has_no_gradient_is_refused():
    model = _with(torch.ao.nn.quantized.dynamic.Linear(8, 8))
    for targets in ("all-linear", ["1"]):
        with pytest.raises(
            lp.TargetError, match=r"weight of '1' is packed, and its layer \(Linear\) cannot be adapted"
        ):
            lp.apply(model, lp.LoRA(targets=targets))
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
