"""Detect weights that are quantised, packed or otherwise encoded, which methods cannot read as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["storage_problem"]


def storage_problem(tensor: Tensor) -> str | None:
    """Return why ``tensor`` cannot be read as a matrix of numbers, as the end of a sentence; None if it can."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"is stored as {tensor.dtype}, which is quantised or packed"
    if tensor.dtype.itemsize == 1:
        return f"is stored as {tensor.dtype}, which is quantised"
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}, not as a dense tensor"
    kind = type(tensor)
    # torch's own subclasses (parameters, buffers, sharded tensors) hold plain numbers.
    if not isinstance(tensor, Tensor) or kind.__module__.partition(".")[0] == "torch":
        return None
    return f"is a {kind.__module__}.{kind.__name__}, a tensor subclass that may hold quantised values"
