"""MiSS: matrix shard sharing.

    W' = W + [M^T M^T ... M^T],    M in R^{r x out}, truncated to in columns

The columns of the matrix are split into shards of r columns, and all shards get the same trained update: r out
parameters per matrix. On activations the layer computes y + M^T (sum of the shards of x). M starts at zero, so the
adapted model initially computes what the base computes. There are two variants; W_ij is the r x r block of W in block
row i and block column j:

    mini    M repeats a block in R^{r x mini_r} along its columns: r mini_r parameters
    bat     W'_ij = W_ij + W_ij B_i + B_i,    B_i in R^{r x r}: r out parameters, an update that depends on W

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
arXiv:2409.15371 (first published as "Bone: Block-Affine Adaptation", which is the variant bat).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.low_rank import LowRankAdapter
from lightning_peft.core.sharded_tensors import with_whole_blocks
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import positive_int, probability
from lightning_peft.methods.families.weight import WeightMethod, check_dropout

__all__ = ["MiSS"]


class MiSSAdapter(LowRankAdapter):
    """Parameter ``miss_block`` (..., r, out), or (..., r, mini_r) in the mini variant."""

    neutral = {"miss_block": 0.0}

    def __init__(self, site: Site, r: int, width: int, dropout: float) -> None:
        super().__init__(site, dropout)
        *batch, self.rows, self.columns = site.shape
        self.miss_block = nn.Parameter(torch.zeros(*batch, r, width))

    def factors(self) -> tuple[Tensor, Tensor]:
        m = self.miss_block
        r, width = m.shape[-2:]
        column = torch.arange(self.columns, device=m.device) % r
        shards = (column == torch.arange(r, device=m.device)[:, None]).to(m.dtype)  # sums the shards of x
        # Without groups, return a view: autograd would keep a copy for backward in every layer.
        up = m.mT if width == self.rows else m.mT.repeat(*[1] * (m.ndim - 2), self.rows // width, 1)
        return shards.expand(*m.shape[:-2], -1, -1), up

    def down(self, host: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        if not self.layout.vectors:
            return super().down(host, x, a)
        # A sum instead of a matrix product, because backward then needs neither A nor x.
        x = with_whole_blocks(x, x.shape[-1] // a.shape[-2])
        return F.pad(x, (0, -x.shape[-1] % a.shape[-2])).unflatten(-1, (-1, a.shape[-2])).sum(-2)

    def extra_repr(self) -> str:
        return f"r={self.miss_block.shape[-2]}, dropout={self.dropout}"


class BatAdapter(WeightAdapter):
    """Parameter ``miss_block`` (..., out / r, r, r) of the bat variant."""

    neutral = {"miss_block": 0.0}

    def __init__(self, site: Site, r: int) -> None:
        super().__init__(site)
        *batch, rows, _ = site.shape
        self.miss_block = nn.Parameter(torch.zeros(*batch, rows // r, r, r))

    def delta(self, weight: Tensor) -> Tensor:
        b = self.miss_block[..., None, :, :]
        r = b.shape[-1]
        # The weight has its stored dtype, which may be half precision while the adapter is float32.
        blocks = weight.to(b.dtype).unflatten(-1, (-1, r)).unflatten(-3, (-1, r)).transpose(-3, -2)
        return (blocks @ b + b).transpose(-3, -2).reshape(weight.shape)


class MiSS(WeightMethod):
    """One trained matrix as the update of every shard of a weight's columns (arXiv:2409.15371).

    Choose it when LoRA learns slowly: its single factor gets a gradient from the first step, and square matrices need
    half of LoRA's parameters. It costs as much compute as LoRA. The bat variant learns faster still, but computes the
    full-size weight in every training step. Merged, it costs nothing.

    Args:
        r: width of a shard; r out parameters train per matrix.
        dropout: probability of zeroing an element of the adapter's input during training; embeddings ignore it.
        variant: ``"standard"``; ``"mini"``, in which groups of ``mini_r`` output features also share one update; or
            ``"bat"``, in which the update depends on the weight. ``"bat"`` requires in and out to be multiples of r.
        mini_r: number of output features per group in the mini variant; out must be a multiple of it.

    Raises:
        ValueError: if r is below 1 or above the number of columns; if the variant cannot split a matrix evenly; if
            dropout is outside [0, 1), or set with ``"bat"`` or for a weight that is not called with activations.

    Example::

        trainer = L.Trainer(callbacks=[lp.MiSS(r=64, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    parameter_count = "r out"
    resume_may_differ = WeightMethod.resume_may_differ | {"dropout"}

    r: int = field(default=64, validator=positive_int, kw_only=False)
    dropout: float = field(default=0.0, validator=probability)
    variant: Literal["standard", "mini", "bat"] = "standard"
    mini_r: int = field(default=1, validator=positive_int)

    def check(self) -> None:
        if self.dropout and self.variant == "bat":
            raise ValueError(
                f"dropout={self.dropout} is not supported with variant='bat', which changes the weight and never sees "
                "the layer's input: set dropout=0"
            )

    def too_small(self, site: Site) -> str | None:
        columns = site.shape[-1]
        if self.r <= columns:
            return None
        return f"r={self.r} is above the {columns} columns of {site.name!r} ({'x'.join(map(str, site.shape))})"

    def build(self, site: Site) -> WeightAdapter:
        if (problem := self.too_small(site)) is not None:
            raise ValueError(f"{problem}: lower r, or exclude the layer and add a second MiSS for it")
        check_dropout("MiSS", self.dropout, site)
        *_, rows, columns = site.shape
        if self.variant == "bat":
            _check_divides("r", self.r, {"rows": rows, "columns": columns}, site)
            return BatAdapter(site, self.r)
        if self.variant == "mini":
            _check_divides("mini_r", self.mini_r, {"rows": rows}, site)
        return MiSSAdapter(site, self.r, self.mini_r if self.variant == "mini" else rows, self.dropout)

    def describe(self, adapter: WeightAdapter) -> str:
        return f"MiSS r={self.r}" if self.variant == "standard" else f"MiSS {self.variant} r={self.r}"


def _check_divides(argument: str, value: int, sides: dict[str, int], site: Site) -> None:
    for side, size in sides.items():
        if size % value:
            raise ValueError(
                f"{argument}={value} does not divide the {size} {side} of {site.name!r}, so it cannot be split evenly: "
                f"choose a divisor of {size}, or exclude the layer and add a second MiSS for it"
            )
