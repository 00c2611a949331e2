"""Low-rank factors of convolution kernels for LoHa and LoKr."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["tucker", "uniform"]


def uniform(*shape: int, fan: int | None = None) -> nn.Parameter:
    """A parameter initialised as in ``nn.Linear``: uniform within 1 / sqrt(fan); ``fan`` defaults to the last
    dimension."""
    bound = 1 / math.sqrt(fan or shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The matrix (out, in * kernel) that is the Tucker product of ``core`` (r, r, kernel), ``rows`` (r, out) and
    ``columns`` (r, in)."""
    return torch.einsum("ijk,io,jc->ock", core.flatten(2), rows, columns).flatten(1)
