"""LoHa: the elementwise product of two low-rank matrices.

    W' = W + s (B1 A1) * (B2 A2),    A1, A2 in R^{r x in}, B1, B2 in R^{out x r},    s = alpha / r

The update has rank up to r^2 with 2 r (in + out) parameters. A2 starts at zero, so the adapted model initially computes
what the base computes. On convolutions, ``use_effective_conv2d`` makes each factor a Tucker-2 product,

    sum_{ij} T[i, j, kernel] B[i, out] A[j, in],    T in R^{r x r x kernel}

with 2 r (in + out + r kernel) parameters.

Hyeon-Woo, Ye-Bin and Oh 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv:2108.06098; for adapters: LyCORIS, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.ranked import RankDropAdapter, RowDropMethod
from lightning_peft.methods.shared.kernel_factors import tucker, uniform
from lightning_peft.ops.recompute import recomputed

__all__ = ["LoHa"]


class LoHaAdapter(RankDropAdapter):
    """``hada_w1_a``, ``hada_w2_a`` (..., out, r) and ``hada_w1_b``, ``hada_w2_b`` (..., r, in).

    With ``use_effective_conv2d`` also ``hada_t1`` and ``hada_t2`` (r, r, *kernel); a is then (r, out), and b (r, in).
    """

    neutral = {"hada_w2_b": 0.0}

    def __init__(self, site: Site, r: int, scale: float, effective: bool, *drops: Any) -> None:
        super().__init__(site, *drops)
        *batch, rows, columns = site.shape
        kernel = site.layout.kernel(site.weight)
        self.r = r
        self.scale = scale
        self.hada_t1 = self.hada_t2 = None
        shape: tuple[int, ...] = (*batch, rows, r)
        if effective and math.prod(kernel) > 1:
            columns //= math.prod(kernel)
            shape = (r, rows)
            self.hada_t1 = uniform(r, r, *kernel, fan=r * math.prod(kernel))
            self.hada_t2 = uniform(r, r, *kernel, fan=r * math.prod(kernel))
        self.hada_w1_a = uniform(*shape)
        self.hada_w1_b = uniform(*batch, r, columns)
        self.hada_w2_a = uniform(*shape)
        self.hada_w2_b = nn.Parameter(torch.zeros(*batch, r, columns))

    def delta(self, weight: Tensor) -> Tensor:
        factors = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        cores = [core for core in (self.hada_t1, self.hada_t2) if core is not None]
        update = recomputed(self._product, *factors, *cores)
        keep = self.drops(update)
        return update if keep is None else update * keep[..., None]

    def _product(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, *cores: Tensor) -> Tensor:
        if cores:
            return tucker(cores[0], a1 * self.scale, b1) * tucker(cores[1], a2, b2)
        return ((a1 * self.scale) @ b1) * (a2 @ b2)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if self.hada_t1 is not None:
            return None
        # (sum_i b_i a_i) * (sum_j b_j a_j) is a sum of r^2 rank-1 terms (b_i * b_j) (a_i * a_j).
        a = (self.hada_w1_b[..., :, None, :] * self.hada_w2_b[..., None, :, :]).flatten(-3, -2)
        b = (self.hada_w1_a[..., :, None] * self.hada_w2_a[..., None, :]).flatten(-2)
        return a, b * self.scale


class LoHa(RowDropMethod):
    """The elementwise product of two low-rank matrices as the update, with rank up to r^2 (arXiv:2108.06098).

    Choose it for image models, or when LoRA is limited by its rank: it reaches rank r^2 with the parameter count of
    LoRA at rank 2 r. It costs a full-size update matrix in every training step, which LoRA avoids. Merged, it costs
    nothing.

    Args:
        r: rank of each factor; 2 r (in + out) parameters train per matrix.
        alpha: the update is scaled by alpha / r.
        use_effective_conv2d: for convolutions (1d, 2d and 3d), share the factors over the kernel: 2 r (in + out + r
            kernel) parameters instead of 2 r (in kernel + out).

    Raises:
        ValueError: if r is below 1, alpha is 0, or a dropout probability is outside [0, 1).

    Example::

        trainer = L.Trainer(callbacks=[lp.LoHa(r=4, targets="type:Conv2d", trainable=["classifier"])])
    """

    parameter_count = "2 r (in + out)"

    use_effective_conv2d: bool = False

    def build(self, site: Site) -> LoHaAdapter:
        return LoHaAdapter(site, self.rank_at(site), self.scale_at(site), self.use_effective_conv2d, *self.drops)
