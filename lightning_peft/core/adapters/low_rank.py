"""Adapters whose update is a product of two thin matrices, s B A."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter, derive_flags
from lightning_peft.core.batching.batched import BatchedAdapters, BatchedLowRank, PerGroupOutput
from lightning_peft.core.sharded_tensors import distribute_like, is_sharded
from lightning_peft.core.targeting.layouts import EmbeddingLayout, LinearLayout
from lightning_peft.core.targeting.sites import Site
from lightning_peft.ops.dropout import dropped, keep_mask

__all__ = ["LowRankAdapter", "add_products", "dropped_input"]

#: number of elements per block; small enough for a CPU cache
_BLOCK = 1 << 18


class LowRankAdapter(WeightAdapter):
    """W + s B A, computed on activations as y + s B (A x). Subclasses implement :meth:`factors`.

    The path of a batch x (..., in) through a layer with one such adapter, such as LoRA on an ``nn.Linear``::

        layer(x)                          its class is swapped: Adapted.forward, then AdapterStack.run_active
          WeightAdapter.run
            y = forward(x)                the frozen layer, bias included: (..., out)
            output(layer, x, y)
              a, b = factors()            (r, in) and (out, r), in the dtype the adapter trains in
              h = layout.down(x, a)       dropout(x) A^T in the dtype of x: (..., r)
              y = layout.up(h, b, y, s)   y + s h B^T in the dtype of y, in one fused operation: (..., out)

    Each layout implements ``down`` and ``up`` for its layer. For a convolution, ``down`` is the layer's convolution
    with r output channels and ``up`` is a convolution of size 1. For an embedding, ``down`` looks up columns of A. If a
    later adapter modifies the weight itself, or the module reads its weight without calling a layer, :meth:`delta` is
    added to W instead. Inside ``lp.rows``, :class:`BatchedLowRank` computes the products of all adapters together.

    Args:
        site: the weight to adapt.
        dropout: probability of dropping an element of x during training. An embedding ignores it: its input is a
            token id, and a dropped id would look up another token.

    Attributes:
        scale: the factor s; 1 unless a method scales its product.
        dropout: the probability that is used; 0 for an embedding.

    Example::

        class ThinAdapter(lp.LowRankAdapter):
            def __init__(self, site):
                super().__init__(site)
                *batch, rows, columns = site.shape
                self.a = nn.Parameter(torch.randn(*batch, 4, columns))
                self.b = nn.Parameter(torch.zeros(*batch, rows, 4))

            def factors(self):
                return self.a, self.b

        class Thin(lp.WeightMethod):
            def build(self, site):
                return ThinAdapter(site)

        lp.apply(model, Thin(targets=["q_proj"]))
    """

    scale: float = 1.0
    #: whether :meth:`delta` is s B A of :meth:`factors`
    delta_is_product: ClassVar[bool] = True
    #: whether :meth:`output` adds s B (A x) and nothing else; a subclass that overrides it and still does must set it
    #: again
    output_is_product: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        derive_flags(
            cls,
            {
                "delta_is_product": {"delta": False},
                "output_is_product": {"delta": False, "transform": False, "output": False},
            },
        )

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.dropout = 0.0 if isinstance(site.layout, EmbeddingLayout) else dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (..., k, in) and B (..., out, k); ``scale`` is not yet applied."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        a, b = self.factors()
        return (b * self.scale) @ a

    @property
    def needs_input(self) -> str | None:
        return f"dropout={self.dropout}" if self.dropout else None

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if not (self.delta_is_product and self.transform_is_sum):
            return None
        a, b = self.factors()
        return a, b * self.scale

    def down(self, host: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """Compute A x; override it if there is a cheaper product with this A."""
        return self.layout.down(host, x, a)

    def project(self, host: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """Compute A dropout(x)."""
        if not (self.dropout and self.training):
            return self.down(host, x, a)
        plain = type(self).down is LowRankAdapter.down and type(self.layout).down is LinearLayout.down
        return dropped_input(F.linear if plain else partial(self.down, host), x, a, self.dropout)

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        return self.layout.up(host, self.project(host, x, a), b, y, self.scale)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        batched = super().batched_class(host)
        together = self.output_is_product and self.layout.vectors and batched is PerGroupOutput
        return BatchedLowRank if together else batched


def dropped_input(project: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Like :func:`dropped`, also for an input ``x`` that tensor parallelism has distributed.

    Every rank then draws the mask of the whole input and uses its own part of it, so that the masks are those of one
    device.
    """
    keep = distribute_like(keep_mask(x.shape, x.device, p), x) if is_sharded(x) else None
    return dropped(project, x, weight, p, keep)


def add_products(matrix: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Return ``matrix`` plus the product B A of each pair (A, B), computed in ``dtype`` and rounded once at the end.

    Computed in blocks, so that a full copy of the matrix in ``dtype`` is never in memory.
    """
    out = torch.empty_like(matrix)
    rows = max(1, _BLOCK * matrix.shape[-2] // max(1, matrix.numel()))
    products = [(a.to(dtype), b.to(dtype).split(rows, -2)) for a, b in pairs]
    for i, (new, old) in enumerate(zip(out.split(rows, -2), matrix.split(rows, -2))):
        total = old.to(dtype, copy=True)
        for a, b in products:
            total += b[i] @ a
        new.copy_(total)
    return out
