"""Recognise key-value caches and recurrent states by their attributes, since models name the argument differently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.module_io import tensors_in

__all__ = ["cache_length", "filled_cache", "find_cache", "is_cache", "states_in"]

#: attributes of the caches and recurrent states of transformers, newest releases first
_MARKS = ("get_seq_length", "has_previous_state", "ssm_states", "conv_states")


def is_cache(value: object) -> bool:
    """Whether ``value`` holds keys and values, or a recurrent state, between calls of a model."""
    if isinstance(value, Tensor | dict | torch.nn.Module):
        return False
    return any(hasattr(value, mark) for mark in _MARKS) or _is_tuple_cache(value)


def find_cache(values: Iterable[object]) -> Any | None:
    """Return the first cache among the arguments or outputs of a call; None if there is none."""
    return next((value for value in values if is_cache(value)), None)


def filled_cache(values: Iterable[object]) -> Any | None:
    """Return the first cache among ``values`` that has seen tokens; None if there is none."""
    return next((value for value in values if is_cache(value) and cache_length(value)), None)


def cache_length(cache: Any) -> int:
    """Return the number of tokens that a cache has seen; 1 for a non-empty recurrent state that does not count."""
    if _is_tuple_cache(cache):
        return int(cache[0][1].shape[-2])  # read from the values, because BLOOM stores its keys transposed
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # transformers raises it if none of the layers is an attention layer
            pass
    if hasattr(cache, "has_previous_state"):
        seen = cache.has_previous_state
        return int(bool(seen() if callable(seen) else seen))
    states = [getattr(cache, mark, None) for mark in ("ssm_states", "conv_states")]
    return int(any(bool(tensor.any()) for tensor in tensors_in(states)))


def states_in(output: object) -> dict[str, Any]:
    """Return the entries of a model's output that a later call may continue from, by name.

    These are caches and lists: RWKV returns its state as a list.
    """
    if not isinstance(output, dict):
        return {}
    return {name: value for name, value in output.items() if is_cache(value) or isinstance(value, list)}


def _is_tuple_cache(value: object) -> bool:
    """Whether ``value`` is a tuple of layers, each a tuple of keys, values and possibly more."""
    return (
        isinstance(value, tuple | list)
        and len(value) > 0
        and all(isinstance(layer, tuple | list) and len(layer) >= 2 for layer in value)
        and all(isinstance(t, Tensor) and t.is_floating_point() and t.ndim >= 3 for layer in value for t in layer[:2])
    )
