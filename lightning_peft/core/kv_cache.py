"""Recognise a key-value cache or recurrent state by what it is: releases and models name the argument differently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.module_io import tensors_in

__all__ = ["cache_length", "filled_cache", "find_cache", "is_cache", "states_in"]

#: what transformers' caches and recurrent states have had in common, the newest releases first
_MARKS = ("get_seq_length", "has_previous_state", "ssm_states", "conv_states")


def is_cache(value: object) -> bool:
    """Whether ``value`` carries keys and values, or a recurrent state, from one call of a model to the next."""
    if isinstance(value, Tensor | dict | torch.nn.Module):
        return False
    return any(hasattr(value, mark) for mark in _MARKS) or _is_tuple_cache(value)


def find_cache(values: Iterable[object]) -> Any | None:
    """The first cache among the arguments or outputs of a call, None without one."""
    return next((value for value in values if is_cache(value)), None)


def filled_cache(values: Iterable[object]) -> Any | None:
    """The first cache among ``values`` that has seen tokens, None without one."""
    return next((value for value in values if is_cache(value) and cache_length(value)), None)


def cache_length(cache: Any) -> int:
    """How many tokens a cache has seen; 1 for a recurrent state that has seen some but does not count them."""
    if _is_tuple_cache(cache):
        return int(cache[0][1].shape[-2])  # the values: BLOOM stores its keys transposed
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # transformers: none of its layers is an attention layer
            pass
    if hasattr(cache, "has_previous_state"):
        seen = cache.has_previous_state
        return int(bool(seen() if callable(seen) else seen))
    states = [getattr(cache, mark, None) for mark in ("ssm_states", "conv_states")]
    return int(any(bool(tensor.any()) for tensor in tensors_in(states)))


def states_in(output: Any) -> dict[str, Any]:
    """The entries of a model's output that a later call may continue from, by name.

    A cache is one, and so is anything else that is neither a tensor nor a tuple of tensors, such as the list of RWKV.
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
