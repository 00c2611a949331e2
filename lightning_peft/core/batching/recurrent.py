"""Split the inputs of ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` into one part for each group of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_peft.core.batching.layout import BatchLayout, RowError, assemble, row_dim, take
from lightning_peft.core.batching.split import map_tensors, merge_outputs
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.module_io import by_name

__all__ = ["is_recurrent", "split_recurrent"]

_FORWARDS = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


def is_recurrent(module: nn.Module) -> bool:
    """Whether the module is called with a sequence and initial states, as torch's recurrent layers are."""
    return isinstance(module, nn.RNNBase) and cast(Any, original_class(module)).forward in _FORWARDS


def split_recurrent(
    batch_layout: BatchLayout,
    module: nn.Module,
    groups: Sequence[Sequence[int]],
    call: Callable[[int, tuple, dict[str, Any]], Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """The same as ``batching.split.split``, for a sequence, packed or not, and initial states (layers, batch, width).

    Raises:
        RowError: if the rows cannot be found in the input.
    """
    n, given, batch_first = sum(map(len, groups)), by_name(module, args, kwargs), bool(module.batch_first)
    x, hx = given["input"], given.get("hx")
    packed = x if isinstance(x, PackedSequence) else None
    lengths = torch.empty(0)
    if packed is not None:
        x, lengths = pad_packed_sequence(packed, batch_first)
    if x.ndim != 3:
        raise RowError(f"{batch_layout} was called with one sequence {tuple(x.shape)} without a batch, for {n} rows")
    where = row_dim(batch_layout, x, n)
    outputs = []
    for i, rows in enumerate(groups):
        part: Any = take(x, where, rows, n)
        if packed is not None:
            part = pack_padded_sequence(part, take(lengths, 0, rows, n), batch_first, enforce_sorted=False)
        outputs.append(call(i, (part, map_tensors(partial(take, dim=1, rows=rows, n=n), hx)), {}))
    hidden, states = ([output[i] for output in outputs] for i in (0, 1))
    if packed is not None:
        hidden = [pad_packed_sequence(h, batch_first, total_length=x.shape[1 - where])[0] for h in hidden]
    whole = assemble(list(zip(groups, hidden)), where)
    last = merge_outputs(batch_layout, groups, states, 1)
    return (whole if packed is None else _packed_like(packed, whole, lengths, where)), last


def _packed_like(packed: PackedSequence, x: Tensor, lengths: Tensor, batch_dim: int) -> PackedSequence:
    """Pack the padded ``x`` in the same order as ``packed``."""
    order = packed.sorted_indices
    if order is not None:
        x, lengths = x.index_select(batch_dim, order), lengths[order.cpu()]
    again = pack_padded_sequence(x, lengths, batch_first=batch_dim == 0)
    return PackedSequence(again.data, again.batch_sizes, order, packed.unsorted_indices)
