"""Prefixes in layers with a sliding window: a prefix leaves the window as any other token does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.attention_prefix import KeysAndValues
from lightning_peft.core.kv_cache import cache_length, find_cache
from lightning_peft.core.optional import config_value

__all__ = ["prefix_in_window", "sliding_window"]


def sliding_window(attention: nn.Module) -> int | None:
    """Length in tokens of the sliding window of a Hugging Face attention layer; None without a window."""
    config = getattr(attention, "config", None)
    if hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    else:
        window, kinds = config_value(config, "sliding_window"), config_value(config, "layer_types")
        index = getattr(attention, "layer_idx", None)
        if kinds and isinstance(index, int) and kinds[index] != "sliding_attention":
            window = None
    return window if isinstance(window, int) and window > 0 else None


def prefix_in_window(
    prefix: KeysAndValues, windows: Sequence[int | None], tokens: int, host: Any, given: Iterable[Any]
) -> KeysAndValues:
    """Limit ``prefix`` so that each query attends only to the part of it within the query's window.

    Args:
        prefix: adds prefix tokens before the keys and values, which become (..., tokens + length, width).
        windows: window lengths: one for the whole batch, or one per row or per group of equally many rows; None means
            no window.
        tokens: length of the prefix.
        host: the attention module.
        given: the arguments of its call: hidden states (batch, length, width), and the KV cache if there is one.
    """
    given = list(given)
    x = next((value for value in given if isinstance(value, Tensor) and value.ndim == 3), None)
    if x is None or not prefix.extends or not any(windows):
        return prefix
    cache, index = find_cache(given), getattr(host, "layer_idx", None)
    # Ask for this layer's length: the layers before it have already added the tokens of this call to the cache.
    past = 0 if cache is None else cache_length(cache) if index is None else int(cache.get_seq_length(index))
    # The prefix has positions 0 to T - 1 and the text follows, so query q is q + T - j positions after prefix token j.
    # If even the last query is close enough to token 0, no mask is needed.
    if past + x.shape[1] - 1 + tokens < min(window for window in windows if window):
        return prefix
    query = past + torch.arange(x.shape[1], device=x.device)[:, None]
    distance = query + tokens - torch.arange(tokens, device=x.device)
    # A row without a window gets a bound that is larger than any distance.
    hidden = torch.stack([distance >= (window or len(distance) + past + tokens) for window in windows])
    if len(windows) > 1:
        hidden = hidden.repeat_interleave(len(x) // len(windows), 0)[:, None]
    return _InWindow(prefix, hidden)


class _InWindow:
    """A prefix with an additional mask: ``hidden`` (..., queries, tokens) is True where a query must not attend to
    it."""

    extends = True

    def __init__(self, prefix: KeysAndValues, hidden: Tensor) -> None:
        self._prefix, self._hidden = prefix, hidden

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values, wide = self._prefix.extend(key, value, mask)
        if wide is None:
            wide = keys.new_zeros(keys.shape[-2])
        hidden = F.pad(self._hidden, (0, keys.shape[-2] - self._hidden.shape[-1]))
        return keys, values, wide & ~hidden if wide.dtype == torch.bool else wide.masked_fill(hidden, float("-inf"))

    def add(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return self._prefix.add(out, query, key, value, scale)
