"""LoKr: a Kronecker product of two small matrices.

    W' = W + s (C (x) D),    C in R^{l x m}, D in R^{k x n},    out = l k, in = m n,    s = alpha / r

l and m are the divisors of out and in closest to their square roots, or to ``decompose_factor``. If r is below half the
larger side of D, D is a product B A of rank r; otherwise it is a full matrix. ``decompose_both`` does the same for C.
One factor starts at zero, so the adapted model initially computes what the base computes. For a square W of side n^2
and full factors, 2 n^2 parameters train.

On vectors the update is computed as C X D^T, where X is x reshaped to m x n; this is far cheaper than a full-size
product. For a convolution, in is the number of input channels, and D has n * kernel columns; with
``use_effective_conv2d`` D is a Tucker-2 product (see :mod:`lightning_peft.methods.loha`).

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv:2309.14859. As in Hugging Face PEFT, the scale is alpha / r even if both factors are full.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.sharded_tensors import with_whole_blocks
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import Check, is_int
from lightning_peft.methods.families.ranked import RankDropAdapter, RowDropMethod
from lightning_peft.methods.shared.kernel_factors import tucker, uniform
from lightning_peft.ops.recompute import recomputed

__all__ = ["LoKr"]


def factorize(n: int, factor: int) -> tuple[int, int]:
    """Two factors of ``n``. The first is ``factor`` if it divides n, else the largest divisor <= factor and sqrt(n)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    largest = min(math.isqrt(n), factor if factor > 0 else n)
    first = next(d for d in range(largest, 0, -1) if n % d == 0)
    return first, n // first


class LoKrAdapter(RankDropAdapter):
    """``lokr_w1`` (..., l, m), or ``lokr_w1_a`` (..., l, r) and ``lokr_w1_b`` (..., r, m).

    ``lokr_w2`` (..., k, n * kernel), or ``lokr_w2_a`` (..., k, r) and ``lokr_w2_b`` (..., r, n * kernel); with
    ``lokr_t2`` (r, r, *kernel) these are (r, k) and (r, n).
    """

    neutral = {"lokr_w1": 0.0, "lokr_w1_a": 0.0}  # an adapter has either a full factor or its two low-rank factors

    def __init__(self, site: Site, r: int, scale: float, factor: int, both: bool, effective: bool, *drops: Any) -> None:
        super().__init__(site, *drops)
        *batch, rows, columns = site.shape
        kernel = site.layout.kernel(site.weight)
        size = math.prod(kernel)
        (l, k), (m, n) = factorize(rows, factor), factorize(columns // size, factor)  # noqa: E741 - the paper's names
        self.r = r
        self.scale = scale
        self.sides = m, n * size
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"):
            self.register_parameter(name, None)
        if both and r < max(l, m) / 2:
            self.lokr_w1_a = nn.Parameter(torch.zeros(*batch, l, r))
            self.lokr_w1_b = uniform(*batch, r, m)
        else:
            self.lokr_w1 = nn.Parameter(torch.zeros(*batch, l, m))
        if r >= max(k, n) / 2:
            self.lokr_w2 = uniform(*batch, k, n * size)
        elif effective and size > 1:
            self.lokr_t2 = uniform(r, r, *kernel, fan=r * size)
            self.lokr_w2_a, self.lokr_w2_b = uniform(r, k), uniform(r, n)
        else:
            self.lokr_w2_a, self.lokr_w2_b = uniform(*batch, k, r), uniform(*batch, r, n * size)

    def factors(self) -> tuple[Tensor, Tensor]:
        """C (..., l, m) and D (..., k, n * kernel), multiplied out."""
        first = self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_a @ self.lokr_w1_b
        if self.lokr_w2 is not None:
            return first, self.lokr_w2
        if self.lokr_t2 is not None:
            return first, tucker(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return first, self.lokr_w2_a @ self.lokr_w2_b

    def delta(self, weight: Tensor) -> Tensor:
        update = torch.einsum("...lm,...kn->...lkmn", *self.factors()).flatten(-4, -3).flatten(-2) * self.scale
        keep = self.drops(update)
        return update if keep is None else update * keep[..., None]

    @property
    def modifies_weight(self) -> bool:
        return not (self.layout.has_activation and self.layout.vectors)

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def product(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            h = self.layout.down(host, with_whole_blocks(x, self.sides[0]).unflatten(-1, self.sides), second)
            # Without ``expand``, matmul copies h to fold its batch dimensions into one product.
            z = (first.to(h.dtype).expand(*h.shape[:-2], *first.shape) @ h).flatten(-2)
            return with_whole_blocks(z, first.shape[-2])  # for the gradient, which backward divides into these blocks

        first, second = self.factors()
        z = recomputed(product, x, first * self.scale, second)
        keep = self.drops(z)
        return y + (z if keep is None else z * keep.to(z.dtype)).to(y.dtype)


class LoKr(RowDropMethod):
    """A Kronecker product of two small matrices as the update (arXiv:2309.14859).

    Choose it when files must be as small as possible but the update should have full rank: it trains about
    2 sqrt(in out) parameters per matrix, and needs the least compute on linear layers. It costs flexibility compared
    with LoRA, and needs a higher learning rate. Merged, it costs nothing.

    Args:
        r: rank of a decomposed factor; a factor whose sides are at most 2 r stays full.
        alpha: the update is scaled by alpha / r.
        decompose_factor: desired side of the first factor, used if it divides the matrix's side; -1 takes the divisor
            closest to the square root.
        decompose_both: decompose the first factor too.
        use_effective_conv2d: for convolutions (1d, 2d and 3d), share the low-rank parts of the second factor over the
            kernel.

    Raises:
        ValueError: if r is below 1, alpha is 0, a dropout probability is outside [0, 1), or decompose_factor is neither
            -1 nor positive.

    Example::

        trainer = L.Trainer(callbacks=[lp.LoKr(r=4, decompose_factor=8, trainable=["classifier"])])
    """

    parameter_count = "the Kronecker factors, about 2 √(in out)"

    decompose_factor: int = field(
        default=-1, validator=Check("-1 or an integer of at least 1", lambda n: is_int(n) and (n == -1 or n >= 1))
    )
    decompose_both: bool = False
    use_effective_conv2d: bool = False

    def build(self, site: Site) -> LoKrAdapter:
        how = self.decompose_factor, self.decompose_both, self.use_effective_conv2d
        return LoKrAdapter(site, self.rank_at(site), self.scale_at(site), *how, *self.drops)
