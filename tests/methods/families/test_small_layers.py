"""Layers that are too small for a method's arguments."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers import close, perturb


class Small(nn.Module):
    """The first layer has one input and four outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(1, 4)
        self.up = nn.Linear(4, 16)
        self.mid = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(torch.tanh(self.up(torch.tanh(self.enter(x)))))))


METHODS = {
    "lora": (lambda **options: lp.LoRA(r=8, **options), "r=8 is above both sides of 'enter'"),
    "dora": (lambda **options: lp.DoRA(r=8, **options), "r=8 is above both sides of 'enter'"),
    "dylora": (lambda **options: lp.DyLoRA(r=8, **options), "r=8 is above both sides of 'enter'"),
    "adalora": (lambda **options: lp.AdaLoRA(init_r=8, target_r=4, **options), "init_r=8 is above both sides of"),
    "oft": (
        lambda **options: lp.OFT(block_size=4, **options),
        r"'enter' \(4x1\) has a side of 1, which cannot be rotated",
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_all_linear_leaves_them_out_and_says_so(method, tmp_path):
    make, why = METHODS[method]
    torch.manual_seed(0)
    model = Small()
    report = lp.apply(model, make())
    assert {"up", "mid"} == set(report.modules)
    assert lp.inspect(Small(), make()).notes == report.notes
    (note,) = [note for note in report.notes if "too small" in note]
    assert re.search(f"all-linear skips enter .too small.: .*{why}", note)
    perturb(model)
    lp.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = Small()
    lp.load_adapter(again, tmp_path)
    x = torch.randn(3, 1)
    close(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["enter", ["all-linear", "enter"]])
def test_one_that_is_named_is_an_error(method, targets):
    make, why = METHODS[method]
    with pytest.raises(ValueError, match=why if method != "oft" else r"'enter' \(4x1\) cannot be divided"):
        lp.inspect(Small(), make(targets=targets))


def test_a_rank_of_its_own_adapts_it():
    assert "enter" in lp.inspect(Small(), lp.LoRA(r=8, rank_pattern={"enter": 1})).modules


def test_if_all_are_too_small_it_is_an_error():
    with pytest.raises(ValueError, match="r=64 is above both sides"):
        lp.inspect(Small(), lp.LoRA(r=64))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_elements(method):
    make, _ = METHODS[method]
    model = Small()
    model.unused = nn.Linear(4, 0)
    notes = lp.apply(model, make()).notes
    assert any(re.search("all-linear skips .*unused", note) for note in notes)
    message = "'unused' has a weight of 0x4, without elements, so it has nothing to adapt. Exclude it"
    with pytest.raises(lp.TargetError, match=message):
        lp.inspect(lp.unload(model), make(targets=["unused", "mid"]))
