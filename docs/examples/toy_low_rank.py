"""An example of a low-rank method: a plain LoRA, W' = W + B A, given by its two factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lightning_peft as lp


class TwoFactors(lp.WeightMethod):
    """A (r x in) starts at random, B (out x r) at zero."""

    r: int = 4

    def build(self, site) -> lp.WeightAdapter:
        return TwoFactorsAdapter(site, self.r)


class TwoFactorsAdapter(lp.LowRankAdapter):
    def __init__(self, site, r: int) -> None:
        super().__init__(site)
        *batch, rows, columns = site.shape
        self.a = nn.Parameter(torch.randn(*batch, r, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(*batch, rows, r))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b
