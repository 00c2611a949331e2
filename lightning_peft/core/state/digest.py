"""Compute digests of tensors and plain values, to detect that a file is not what was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["difference", "tensor_digests", "value_digest"]

LENGTH = 32  #: hexadecimal digits (128 bits): detects accidents, not an attacker, who can write digests as well


def tensor_digests(tensors: Mapping[str, object]) -> dict[str, str]:
    """Return a digest of each tensor's name, dtype, shape and bytes (half of a SHA-256, in hexadecimal)."""
    return {name: _digest(name, tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def value_digest(value: object) -> str:
    """Return the digest of a plain value; a tuple and a list of the same values have the same digest."""
    try:
        text = json.dumps(value, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # unsortable keys or a list inside itself: not written by us
        text = repr(value)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def difference(saved: object, found: Mapping[str, str]) -> str | None:
    """Return the first name in which two sets of digests differ, and how; None if they agree."""
    if not isinstance(saved, Mapping):
        return "the digests"
    for name in [*found, *(name for name in saved if name not in found)]:
        if saved.get(name) != found.get(name):
            how = "is missing" if name not in found else "was not there" if name not in saved else "has changed"
            return f"{name!a} {how}"
    return None


def _digest(name: str, tensor: Tensor) -> str:
    header = repr((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
    digest = hashlib.sha256(header.encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]
