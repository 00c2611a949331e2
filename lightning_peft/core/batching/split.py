"""Run a module once per group of rows, on the part of its inputs that belongs to the group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.batching.layout import SQUARE, BatchLayout, RowError, assemble, row_dim, take
from lightning_peft.core.kv_cache import find_cache
from lightning_peft.core.module_io import parameters_of

__all__ = ["map_tensors", "merge_outputs", "split"]


def split(
    batch_layout: BatchLayout,
    module: nn.Module,
    groups: Sequence[Sequence[int]],
    call: Callable[[int, tuple, dict[str, Any]], Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Run a module once for each group of rows, and join the outputs in row order.

    Args:
        batch_layout: how the module sees the batch.
        module: the module.
        groups: the rows of each group.
        call: runs the module, given the index of the group and the group's arguments.
        args, kwargs: the arguments for the whole batch.

    Raises:
        RowError: if the rows cannot be found in the arguments or in the outputs, or if there is a KV cache.
    """
    n = sum(map(len, groups))
    values = (*args, *kwargs.values())
    if find_cache(values) is not None:
        raise RowError(
            f"{batch_layout} must run once per adapter, but all rows share one KV cache: call the model with "
            "use_cache=False, or use one adapter for these rows"
        )
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise RowError(f"{batch_layout} was called without a tensor, so its rows cannot be found: exclude it")
    where = row_dim(batch_layout, first, n)
    size = first.shape[where]
    names = parameters_of(module)[: len(args)] if len(values) > 1 else []
    names += [""] * (len(args) - len(names))

    def part(value: Any, rows: Sequence[int], name: str) -> Any:
        def of(t: Tensor) -> Tensor:
            dim = where if t.ndim > 2 and name != "attn_mask" else 0
            shared = t.ndim == 0 or (t.ndim == 2 and name in SQUARE)
            if shared or t.shape[dim] % n or (t.shape[dim] not in (size, n) and name != "attn_mask"):
                return t
            return take(t, dim, rows, n)

        return map_tensors(of, value)

    outputs = []
    for i, rows in enumerate(groups):
        positional = tuple(part(value, rows, name) for name, value in zip(names, args))
        outputs.append(call(i, positional, {name: part(value, rows, name) for name, value in kwargs.items()}))
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        # Their second output (attention weights, hidden states) holds the batch in a different dimension.
        second = 0 if isinstance(module, nn.MultiheadAttention) else 1
        hidden, rest = ([o[i] for o in outputs] for i in (0, 1))
        return merge_outputs(batch_layout, groups, hidden, where), merge_outputs(batch_layout, groups, rest, second)
    return merge_outputs(batch_layout, groups, outputs, where)


def merge_outputs(batch_layout: BatchLayout, groups: Sequence[Sequence[int]], outputs: list[Any], where: int) -> Any:
    """Put the outputs of all groups, which may be nested, back into the order of the batch's rows.

    Args:
        batch_layout: the batch's layout.
        groups: the rows of each group.
        outputs: the output of each group.
        where: the dimension of the rows in tensors of more than two dimensions.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        dim = where if first.ndim > 2 else 0
        per_row = {o.shape[dim] / len(rows) if o.ndim else 0.0 for rows, o in zip(groups, outputs)}
        rest = {(*o.shape[:dim], *o.shape[dim + 1 :]) for o in outputs}
        if len(per_row) == len(rest) == 1 and first.ndim:
            return assemble(list(zip(groups, outputs)), dim)
        if len(rest) > 1 and len(per_row) == 1:
            raise RowError(
                f"{batch_layout} returns outputs of shapes {[tuple(o.shape) for o in outputs]} for rows "
                f"{[*map(list, groups)]}: heads of different widths cannot serve one batch; call the model once for "
                "each width"
            )
        raise RowError(
            f"{batch_layout} ran once for each group of rows, and its outputs, of shapes "
            f"{[tuple(o.shape) for o in outputs]}, cannot be joined: it must return one output per row (not a loss), "
            "with the same shape for all rows"
        )
    if isinstance(first, Mapping):
        merged = {key: merge_outputs(batch_layout, groups, [o[key] for o in outputs], where) for key in first}
        return merged if type(first) is dict else type(first)(**merged)
    if isinstance(first, tuple | list):
        parts = [merge_outputs(batch_layout, groups, list(values), where) for values in zip(*outputs)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to all tensors in ``value``, including those in its tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, v) for v in value)
    if type(value) is dict:
        return {k: map_tensors(function, v) for k, v in value.items()}
    return value
