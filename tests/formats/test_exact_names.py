"""Patterns in this package's own format match the same modules in any holder of the base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files
from tests.formats.models import Called, Wrapped, adapted, logits


class Tower(nn.Module):
    """A stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x)


class TwoTowers(Tower):
    """``transformer`` and ``visual.transformer``, as in open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 12)
        self.visual = Tower()

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.emb(x)) + self.visual(self.emb(x))


METHODS = {
    "prompt": lambda: lp.PromptTuning(2, targets="net.transformer"),
    "SSF": lambda: lp.SSF(targets=["net.transformer.layers.0.linear1"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_one_of_two_towers(method, tmp_path):
    base, x = TwoTowers().eval(), torch.randint(0, 64, (2, 5))
    ours = adapted(Wrapped(copy.deepcopy(base)), METHODS[method]())
    lp.save_adapter(ours, tmp_path)
    assert "visual" not in str(read_files(tmp_path).config["config"])
    for holder in (copy.deepcopy(base), Wrapped(copy.deepcopy(base)), Called(copy.deepcopy(base))):
        lp.load_adapter(holder, tmp_path)
        torch.testing.assert_close(logits(holder, x), logits(ours, x))
