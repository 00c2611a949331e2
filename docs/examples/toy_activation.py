"""An example of an activation method: a trained shift of each feed-forward layer's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lightning_peft as lp


class Shift(lp.ActivationMethod):
    """Adds one number to each feature."""

    def build(self, site) -> lp.ActivationAdapter:
        return ShiftAdapter(site)


class ShiftAdapter(lp.ActivationAdapter):
    def __init__(self, site) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(torch.zeros(site.width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shift
