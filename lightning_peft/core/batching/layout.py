"""Find the rows of a batch in the tensors that a module takes and returns.

Rows are the first dimension, with one or more consecutive entries per row (beams, windows, flattened tokens). In
modules that take the sequence first, they are the second dimension. Any other arrangement is an error that names the
module, because a guess would give rows the wrong adapter.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.module_io import tensors_in
from lightning_peft.core.names import parents
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.layouts import layout_of

__all__ = [
    "SQUARE",
    "BatchLayout",
    "RowError",
    "assemble",
    "batch_dims",
    "batch_layouts",
    "check_experts",
    "entries",
    "row_dim",
    "take",
]

#: names of arguments that may be (length, length) masks, shared by all rows
SQUARE = ("mask", "src_mask", "tgt_mask", "memory_mask", "attn_mask")
_TRANSFORMERS = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)


class RowError(ValueError):
    """The rows of a mixed batch cannot be matched with their adapters in some module."""


@dataclass(frozen=True)
class BatchLayout:
    """A module and the order of dimensions in which it sees the batch.

    Attributes:
        name: its qualified name.
        kind: the name of its class.
        order: whether the batch or the sequence is the first dimension; ``"either"`` if the model contains modules of
            both kinds and no module around this one determines the order.
        experts: the number of experts in its own stacked parameters; 0 if it has none.
    """

    name: str
    kind: str
    order: Literal["batch", "sequence", "either"]
    experts: int = 0

    def __str__(self) -> str:
        return f"{self.name or 'the model'!r} ({self.kind})"


def batch_layouts(model: nn.Module, names: Iterable[str]) -> dict[str, BatchLayout]:
    """Return how the modules ``names`` see the batch, as far as their classes and those of their parents show it."""
    modules = dict(base_modules(model, remove_duplicate=False))
    mixed = _sequence_first(model)
    found = {}
    for name in names:
        around = [modules[outer] for outer in (*parents(name), name)]
        order: Literal["batch", "sequence", "either"] = "either" if mixed else "batch"
        if isinstance(modules[name], nn.MultiheadAttention | nn.RNNBase):
            order = "sequence" if _sequence_first(modules[name]) else "batch"
        elif mixed and any(isinstance(m, _TRANSFORMERS) and _sequence_first(m) for m in around):
            order = "sequence"
        found[name] = BatchLayout(name, original_class(modules[name]).__name__, order, _experts(modules[name]))
    return found


def _experts(module: nn.Module) -> int:
    stacked = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
    return 0 if layout_of(module) is not None or not stacked else len(stacked[0])


def check_experts(batch_layout: BatchLayout, given: Iterable[object], n: int) -> None:
    """Refuse stacked experts whose input is ordered by expert instead of by row.

    If the module does not get an expert index per token, its input is repeated for each expert or sorted by expert.
    The first dimension can then be a multiple of the number of rows without being ordered by row.

    Raises:
        RowError: if the input may be ordered by expert.
    """
    found = list(tensors_in(given))
    x = next((t for t in found if t.is_floating_point()), None)
    if not batch_layout.experts or x is None:
        return
    routed = any(t.ndim and not t.is_floating_point() and len(t) == len(x) for t in found)
    if not routed and (x.ndim == 2 or (x.ndim == 3 and len(x) == batch_layout.experts != n)):
        raise RowError(
            f"{batch_layout} holds {batch_layout.experts} experts and was called with {tuple(x.shape)}, which may be "
            "sorted by expert: its entries cannot be matched with rows. Exclude it, or call the model once for "
            "each adapter with lp.active"
        )


def _sequence_first(module: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention | nn.RNNBase) and not m.batch_first for _, m in base_modules(module))


def batch_dims(batch_layout: BatchLayout, x: Tensor) -> tuple[int, ...]:
    """Return the dimension of the module's input ``x`` that holds the batch; both candidates if it is ambiguous."""
    if batch_layout.order == "either" and x.ndim > (2 if x.is_floating_point() else 1):
        return (0, 1)
    return (1,) if batch_layout.order == "sequence" and x.ndim > 2 else (0,)


def row_dim(batch_layout: BatchLayout, x: Tensor, n: int) -> int:
    """Return the dimension of the module's input ``x`` that holds the ``n`` rows.

    Raises:
        RowError: if no dimension fits, or it cannot be determined which one does.
    """
    dims = batch_dims(batch_layout, x)
    fits = [d for d in range(min(2, x.ndim)) if x.shape[d] and x.shape[d] % n == 0]
    looked_up = not x.is_floating_point()
    if len(dims) > 1 and len(fits) > 1:
        raise RowError(
            f"{batch_layout} was called with {tuple(x.shape)} for {n} rows, in a model that has modules with "
            "batch_first=False: rows may be the first or the second dimension. Build the "
            "model with batch_first=True, or use another batch size"
        )
    dim = fits[0] if len(dims) > 1 and fits else dims[0]
    if dim not in fits:
        raise RowError(
            f"{batch_layout} was called with a tensor of shape {tuple(x.shape)}, whose dimension {dim} is not a "
            f"multiple of the {n} rows. Pass as many names as the batch has rows. If this module does not see the "
            "batch row by row (the experts of a mixture, a table that all rows share), its adapters cannot differ by "
            "row: exclude it"
        )
    if x.ndim == 2 and not looked_up and re.search(r"(^|\.)experts\.\d+(\.|$)", batch_layout.name):
        raise RowError(
            f"{batch_layout} is one of several experts, which get a mixture of tokens from all rows: its entries "
            "cannot be matched with rows. Exclude it"
        )
    if x.ndim == 1 and looked_up and (len(x) != n or torch.equal(x, torch.arange(n, device=x.device))):
        raise RowError(
            f"{batch_layout} was called with {len(x)} indices that look like positions, which all rows share: its "
            "adapters cannot differ by row. Exclude it, or call it with (batch, length) indices"
        )
    return dim


def take(x: Tensor, dim: int, rows: Sequence[int], n: int) -> Tensor:
    """Return the entries of ``x`` along ``dim`` that belong to ``rows``, given ``n`` rows in total."""
    repeats = x.shape[dim] // n
    if rows[-1] - rows[0] + 1 == len(rows):  # rows are ascending, so these are contiguous: a view is enough
        return x.narrow(dim, rows[0] * repeats, len(rows) * repeats)
    return x.index_select(dim, entries(tuple(rows), repeats, x.device))


@functools.lru_cache(maxsize=4096)
def entries(rows: tuple[int, ...], repeats: int, device: torch.device) -> Tensor:
    """Return the indices of the entries of ``rows`` if each row has ``repeats`` entries."""
    with torch.inference_mode(False):  # the cached tensor may be saved for a backward later
        return torch.tensor([r * repeats + i for r in rows for i in range(repeats)], device=device)


def assemble(pieces: Sequence[tuple[Sequence[int], Tensor]], dim: int) -> Tensor:
    """Join pieces, each with the entries of some rows, into one tensor in row order; the inverse of :func:`take`."""
    order = [row for rows, _ in pieces for row in rows]
    whole = torch.cat([piece for _, piece in pieces], dim)
    if order == sorted(order):
        return whole
    inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
    return whole.index_select(dim, entries(inverse, whole.shape[dim] // len(order), whole.device))
