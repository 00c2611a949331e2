"""An example of a weight method: a trained factor for each output feature, W' = diag(1 + g) W."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lightning_peft as lp


class RowScale(lp.WeightMethod):
    """One factor for each output feature."""

    def build(self, site) -> lp.WeightAdapter:
        return RowScaleAdapter(site)


class RowScaleAdapter(lp.WeightAdapter):
    def __init__(self, site) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.zeros(*site.shape[:-1], 1))

    def delta(self, weight: Tensor) -> Tensor:
        return self.gain * weight
