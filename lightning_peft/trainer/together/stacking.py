"""Join the arguments of several calls of a module along the batch, and divide its output again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_peft.core.batching.layout import SQUARE
from lightning_peft.core.kv_cache import is_cache
from lightning_peft.core.module_io import parameters_of

__all__ = ["Call", "NotPerRow", "divide", "leaves", "stack", "together"]


class NotPerRow(Exception):
    """A module returned a value that cannot be divided into one entry per row; the message names it."""


class Call:
    """The call of a module in the step of one adapter.

    Attributes:
        name: the adapter's name.
        rows: the size of the batch; 0 if the arguments contain no tensor.
        values: the values in the arguments, flattened.
        spec: the structure of the arguments.
        output: what the call returns, once it is known.
        done: whether the output is known.
    """

    def __init__(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.name, self.output, self.done = name, None, False
        self.args, self.kwargs = args, kwargs
        self.values, self.spec = pytree.tree_flatten((args, kwargs))
        self.rows = next((len(v) for v in self.values if isinstance(v, Tensor) and v.ndim), 0)
        names = [*(parameters_of(module) + [""] * len(args))[: len(args)], *kwargs]
        masks = [
            name in SQUARE and isinstance(value, Tensor) and value.ndim == 2
            for name, value in zip(names, (*args, *kwargs.values()))
            for _ in pytree.tree_leaves(value)
        ]
        self.per_row = [
            isinstance(v, Tensor) and v.ndim > 0 and len(v) == self.rows and not mask
            for v, mask in zip(self.values, masks, strict=True)
        ]


def together(calls: Sequence[Call]) -> list[list[Call]]:
    """Return groups of calls that can share a pass: same structure, dtypes and shapes, except for the batch size."""
    groups: list[list[Call]] = []
    for call in calls:
        group = next((g for g in groups if call.rows and _fit(g[0], call)), None)
        if group is None:
            groups.append([call])
        else:
            group.append(call)
    return groups


def _fit(a: Call, b: Call) -> bool:
    if a.spec != b.spec or a.per_row != b.per_row:
        return False
    for x, y, per_row in zip(a.values, b.values, a.per_row):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.dtype != y.dtype or x.device != y.device or x.shape[per_row:] != y.shape[per_row:]:
                return False
            if not per_row and not (x is y or torch.equal(x, y)):
                return False
        elif type(x) is not type(y) or not (x is y or (isinstance(x, bool | int | float | str) and x == y)):
            return False
    return True


def stack(calls: Sequence[Call]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of one call for the rows of all ``calls``, in their order."""
    first = calls[0]
    values = [
        torch.cat([call.values[i] for call in calls]) if per_row else first.values[i]
        for i, per_row in enumerate(first.per_row)
    ]
    args, kwargs = pytree.tree_unflatten(values, first.spec)
    return args, kwargs


def divide(output: Any, sizes: Sequence[int]) -> list[Any]:
    """Return the part of ``output`` that belongs to each call, given the number of rows of each.

    Caches of keys and values are left out: only a second call of the network could use them.

    Raises:
        NotPerRow: if a value does not have one entry for each row.
    """
    values, spec = pytree.tree_flatten(output, is_leaf=is_cache)
    parts: list[Sequence[Any]] = []
    for value in values:
        if isinstance(value, Tensor) and value.ndim and len(value) == sum(sizes):
            # Not narrow, whose backward would allocate a gradient of the whole output for each part.
            parts.append(torch.split(value, list(sizes)))
        elif value is None or isinstance(value, bool | str):
            parts.append([value] * len(sizes))
        elif is_cache(value):
            parts.append([None] * len(sizes))
        else:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise NotPerRow(f"it returns {what} for {sum(sizes)} rows, which is not one value for each row")
    return [pytree.tree_unflatten([part[i] for part in parts], spec) for i in range(len(sizes))]


def leaves(output: Any) -> list[Tensor]:
    """Return the tensors in ``output``, without those in caches."""
    return [v for v in pytree.tree_leaves(output, is_leaf=is_cache) if isinstance(v, Tensor)]
