"""Adapters whose update is a product of two thin matrices, s B A."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.core.adapter import WeightAdapter
from lightning_peft.core.row_links import AfterRows, LowRankRows, RowLink
from lightning_peft.ops.dropout import dropped

__all__ = ["LowRankAdapter"]


class LowRankAdapter(WeightAdapter):
    """W + s B A, computed on activations as y + s B (A x); a subclass gives :meth:`factors`.

    Attributes:
        scale: s.
        dropout: probability of dropping an element of x while training.
    """

    scale: float
    dropout: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (..., k, in) and B (..., out, k) as they run, to be scaled by ``scale``."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return (b * self.scale) @ a

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if type(self).transform is not WeightAdapter.transform:
            return None
        a, b = self.factors()
        return a, b * self.scale

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def down(x: Tensor, a: Tensor) -> Tensor:
            return self.layout.down(host, x, a)

        a, b = self.factors()
        h = dropped(down, x, a, self.dropout) if self.dropout and self.training else down(x, a)
        return self.layout.up(host, h, b, y, self.scale)

    def row_link(self, host: nn.Module) -> type[RowLink] | None:
        if type(self).output is not LowRankAdapter.output and type(self).row_link is LowRankAdapter.row_link:
            return super().row_link(host)  # it adds something of its own beside the product
        link = super().row_link(host)
        return LowRankRows if link is AfterRows and self.layout.vectors else link
