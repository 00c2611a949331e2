"""Dropout before a small projection, without storing the dropped-out input.

For ``project(dropout(x), w)``, plain autograd stores the dropped-out copy of ``x`` to compute the gradient of ``w``.
The copy is as large as ``x``, once for every adapted layer. :func:`dropped` instead stores ``x``, which several layers
share, and a mask with one byte per element, and recomputes the copy in backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.ops.recompute import recomputed

__all__ = ["dropped", "dropped_reference"]

Project = Callable[[Tensor, Tensor], Tensor]


def dropped_reference(project: Project, x: Tensor, weight: Tensor, p: float) -> Tensor:
    """The reference for :func:`dropped`, in plain operations."""
    return project(F.dropout(x, p), weight)


def dropped(project: Project, x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Return ``project(dropout(x, p), weight)`` for a ``project`` that is linear in its first argument.

    Args:
        project: a function of the input and the weight; called again in backward.
        x: the input, of any shape.
        weight: the weight of the projection.
        p: the probability of zeroing an element, in [0, 1).
    """
    if torch.compiler.is_compiling():
        return dropped_reference(project, x, weight, p)  # the compiler itself decides what to store
    scale = 1 / (1 - p)  # applied to the projection, which is smaller than x
    return recomputed(lambda x, weight, keep: project(x * keep, weight) * scale, x, weight, _keep_mask(x, p))


def _keep_mask(x: Tensor, p: float) -> Tensor:
    """Return a mask in the shape of ``x``; each element is False with probability ``p``."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    # Split each 64-bit draw into four 16-bit draws, because the generator is the main cost of dropout on a CPU. The
    # resulting probability is exact to 1/65536.
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= round(p * 65536) - 32768).view(x.shape)
