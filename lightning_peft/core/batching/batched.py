"""Run several adapters of one type in a single forward of their host over a mixed batch.

A :class:`BatchedAdapters` object takes the place of a single adapter: it is called around the host with the whole batch
and applies to each row the adapter that the row names. For adapter types without such a class, the host runs once per
adapter instead (:mod:`~lightning_peft.core.batching.split`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.batching.layout import BatchLayout, assemble, entries, row_dim, take
from lightning_peft.core.module_io import hidden_state, with_hidden_state
from lightning_peft.ops.dropout import dropped

__all__ = ["BatchedAdapters", "BatchedLowRank", "BatchedPassthrough", "PerGroupOutput"]


class BatchedAdapters:
    """Adapters of one type on one host, and the rows that use them.

    Args:
        batch_layout: how the host sees the batch.
        adapters: the adapter of each row; None for a row that uses none of them.
    """

    def __init__(self, batch_layout: BatchLayout, adapters: Sequence[Any]) -> None:
        self.batch_layout = batch_layout
        self.adapters = tuple(adapters)
        self.n = len(self.adapters)
        self.rows = tuple(i for i, adapter in enumerate(self.adapters) if adapter is not None)
        self.groups: list[tuple[Any, tuple[int, ...]]] = [
            (adapter, tuple(i for i in self.rows if self.adapters[i] is adapter))
            for adapter in dict.fromkeys(self.adapters[i] for i in self.rows)
        ]

    def close(self) -> None:
        """Free the values that are kept between the calls of one context."""

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the host's output, like :meth:`lightning_peft.core.adapters.base.Adapter.run`."""
        raise NotImplementedError


class BatchedPassthrough(BatchedAdapters):
    """Adapters that never change the output, such as :class:`~lightning_peft.core.adapters.activation.InputCapture`."""

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for adapter, _ in self.groups[:-1]:
            adapter.run(host, lambda *args, **kwargs: None, *args, **kwargs)
        return self.groups[-1][0].run(host, call, *args, **kwargs)


class PerGroupOutput(BatchedAdapters):
    """Adapters that modify the host's output: the host runs once, then each adapter runs on its rows."""

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        y = hidden_state(output, self.batch_layout.name)
        rest = tuple(i for i in range(self.n) if self.adapters[i] is None)
        pieces = []
        for adapter, rows in self.groups:
            x = adapter.reads(args, kwargs)
            x = y if x is None else x
            dim = row_dim(self.batch_layout, x, self.n)
            pieces.append((rows, adapter.after(host, take(x, dim, rows, self.n), take(y, dim, rows, self.n))))
        if rest:
            pieces.append((rest, take(y, dim, rest, self.n)))
        return with_hidden_state(output, assemble(pieces, dim))


class BatchedLowRank(BatchedAdapters):
    """Low-rank updates of vectors, computed for all rows together with two batched matrix products.

    Adapters may have different ranks: smaller ones are padded with zeros.
    """

    def __init__(self, batch_layout: BatchLayout, adapters: Sequence[Any]) -> None:
        super().__init__(batch_layout, adapters)
        self._kept: tuple[Any, tuple[Tensor, Tensor]] | None = None
        position = {adapter: i for i, (adapter, _) in enumerate(self.groups)}
        self.slots = tuple(position[self.adapters[i]] for i in self.rows)  # the place of each row's adapter in groups

    @functools.cached_property
    def _state(self) -> list[Tensor]:
        parts = [part for adapter, _ in self.groups for part in adapter.modules()]
        return [t for p in parts for t in (*p._parameters.values(), *p._buffers.values()) if t is not None]

    def close(self) -> None:
        self._kept = None
        vars(self).pop("_state", None)  # the parameters may be replaced before the next context

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        dim = row_dim(self.batch_layout, x, self.n)
        ours = take(x, dim, self.rows, self.n).movedim(dim, 0)
        ours = ours.reshape(len(self.rows), -1, x.shape[-1])
        a, b = self._factors(ours)
        h = self._down(ours, a)
        whole = y.movedim(dim, 0)
        shape = whole.shape
        whole = whole.reshape(self.n, -1, y.shape[-1])
        b = b.to(whole.dtype)
        if len(self.rows) == self.n:
            out = torch.baddbmm(whole, h.to(b.dtype), b)
        else:
            # The layer has just created its output. Without a backward, nothing else needs the value, so it can be
            # updated in place.
            add = torch.Tensor.index_add if torch.is_grad_enabled() else torch.Tensor.index_add_
            out = add(whole, 0, entries(self.rows, 1, y.device), torch.bmm(h.to(b.dtype), b).to(whole.dtype))
        return out.view(shape).movedim(0, dim)

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        rates = [adapter.dropout if adapter.training else 0.0 for adapter in map(self.adapters.__getitem__, self.rows)]
        if not any(rates):
            return torch.bmm(x, a)
        if len(set(rates)) == 1:
            return dropped(torch.bmm, x, a, rates[0])
        # Adapters with different rates need a mask per row; dropout on ones returns the scaled mask.
        drops = torch.stack([F.dropout(torch.ones_like(row), rate) for row, rate in zip(x, rates)])
        return torch.bmm(x * drops, a)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (rows, in, r) and B (rows, r, out) for the rows with an adapter, scaled and padded to one rank.

        They are kept between calls while no parameter or buffer has changed.
        """
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        # Never cache trained factors: writing through ``.data`` (weight averaging does) does not increase the version
        # counter that the cache relies on.
        if torch.compiler.is_compiling() or any(t.requires_grad for t in self._state):
            return self._stacked(dtype)
        key = (
            (dtype, x.device, torch.is_inference_mode_enabled()),
            [-1 if t.is_inference() else t._version for t in self._state],
            [adapter.training for adapter, _ in self.groups],
        )
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = self._kept = key, self._stacked(dtype)
        return kept[1]

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pairs = [adapter.factors() for adapter, _ in self.groups]
        r = max(len(a) for a, _ in pairs)
        if any(len(a) < r for a, _ in pairs):
            pairs = [(F.pad(a, (0, 0, 0, r - len(a))), F.pad(b, (0, r - b.shape[-1]))) for a, b in pairs]
        a, b = (torch.stack(factors) for factors in zip(*pairs))
        scales = [adapter.scale for adapter, _ in self.groups]
        one_scale = len(set(scales)) == 1
        b = b * scales[0] if one_scale else torch.stack([each * scale for each, scale in zip(b, scales)])
        a, b = a.to(dtype), b.to(dtype)
        if len(self.groups) < len(self.rows):
            slots = entries(self.slots, 1, a.device)
            a, b = a.index_select(0, slots), b.index_select(0, slots)
        return a.mT, b.mT
