"""Join the key-value caches of several texts into one batch, and take texts out of it again.

A row of a batch is padded on its left: its newest token is always in the last column. Joining pads the shorter cache
with zeros, which the attention mask hides, so each row computes what it would compute alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_join", "join", "select"]


def can_join(cache: Any, length: int) -> bool:
    """Whether a cache of ``length`` tokens can be padded and joined.

    This is possible if each of its layers has only keys and values (batch, heads, length, width), of all tokens. It is
    not possible with sliding windows, recurrent states, or virtual tokens in the cache.
    """
    layers = getattr(cache, "layers", None)
    if not layers:
        return False
    for layer in layers:
        tensors = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
        if tensors.keys() != {"keys", "values"} or getattr(layer, "is_sliding", False):
            return False
        if any(t.ndim != 4 or t.shape[2] != length for t in tensors.values()):
            return False
    return True


def join(caches: list[Any], masks: list[Tensor]) -> tuple[Any, Tensor]:
    """Join caches into one; their rows follow each other.

    Args:
        caches: :func:`can_join` must be true for each.
        masks: the attention mask (rows, length) of each, 1 for visible tokens.

    Returns:
        The cache and its attention mask, of the longest length.
    """
    length = max(mask.shape[1] for mask in masks)
    pads = [length - mask.shape[1] for mask in masks]
    whole = _like(caches[0])
    for i, layer in enumerate(whole.layers):
        for name in ("keys", "values"):
            parts = [getattr(cache.layers[i], name) for cache in caches]
            padded = [torch.nn.functional.pad(p, (0, 0, pad, 0)) if pad else p for p, pad in zip(parts, pads)]
            setattr(layer, name, torch.cat(padded))
    return whole, torch.cat([torch.nn.functional.pad(m, (pad, 0)) for m, pad in zip(masks, pads)])


def select(cache: Any, mask: Tensor, rows: list[int]) -> tuple[Any, Tensor]:
    """Return the cache and the mask of some rows, without the columns that are padding in all of them."""
    index = torch.tensor(rows, device=mask.device)
    mask = mask[index]
    first = int(mask.argmax(1).min())  # argmax returns the first visible column of each row
    part = _like(cache)
    for layer, old in zip(part.layers, cache.layers):
        layer.keys, layer.values = old.keys[index, :, first:], old.values[index, :, first:]
    return part, mask[:, first:]


def _like(cache: Any) -> Any:
    """Return a copy of a cache whose layers can get other keys and values."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    return part
