"""LoRA-XS (arXiv:2405.17604): W' = W + B R A with A and B fixed by the SVD of W; only R (r x r) trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lightning_peft as lp


class LoRAXS(lp.WeightMethod):
    """r^2 parameters for each matrix, whatever its size."""

    r: int = 4

    def build(self, site) -> lp.WeightAdapter:
        return LoRAXSAdapter(site, self.r)


class LoRAXSAdapter(lp.LowRankAdapter):
    def __init__(self, site, r: int) -> None:
        super().__init__(site)
        u, s, vh = torch.linalg.svd(site.matrix.float().cpu(), full_matrices=False)
        self.register_buffer("a", vh[..., :r, :].contiguous())
        self.register_buffer("b", u[..., :r] * s[..., None, :r])
        self.core = nn.Parameter(torch.zeros(*site.shape[:-2], self.a.shape[-2], self.a.shape[-2]))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b @ self.core
