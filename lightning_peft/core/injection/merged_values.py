"""Compute the weights of a layer after a merge, before they are rounded to the stored dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.effective_weights import base_tensor, effective_weights
from lightning_peft.core.adapters.low_rank import LowRankAdapter, add_products
from lightning_peft.core.injection.low_rank_factors import evaluating
from lightning_peft.core.sharded_tensors import is_sharded
from lightning_peft.core.targeting.computed_weights import steady
from lightning_peft.core.targeting.layouts import WeightLayout

__all__ = ["merged_values"]


def merged_values(host: nn.Module, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """Return the host's weights after ``adapters`` in order, in eval mode and before rounding to the stored dtype."""
    stored = {p: base_tensor(host, p) for a in adapters for p in (*a.overrides(), *a.weights())}
    dtype = torch.float32
    for tensor in stored.values():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            dtype = torch.promote_types(dtype, tensor.dtype)
    with evaluating(*adapters), steady(host):
        return _plain_sums(host, adapters, dtype) or effective_weights(host, adapters, dtype)


def _plain_sums(host: nn.Module, adapters: Iterable[Adapter], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the new weights, rounded, if ``adapters`` only add low-rank products; empty otherwise.

    This common case does not need a copy of the weight in float32.
    """
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    layouts: dict[str, WeightLayout] = {}
    for adapter in adapters:
        if adapter.overrides():
            return {}
        for parameter, part in adapter.weights().items():
            pair = part.low_rank() if isinstance(part, LowRankAdapter) and not part.changes_bias else None
            if pair is None:
                return {}
            pairs.setdefault(parameter, []).append(pair)
            layouts[parameter] = part.layout
    stored = {p: cast(torch.Tensor, base_tensor(host, p)).detach() for p in pairs}
    if any(map(is_sharded, stored.values())):
        return {}
    return {p: layouts[p].stored(add_products(layouts[p].matrix(stored[p]), pairs[p], dtype), stored[p]) for p in pairs}
