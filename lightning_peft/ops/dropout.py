"""Dropout in front of a small projection, without keeping the dropped-out input.

``project(dropout(x), w)`` saves, under plain autograd, the dropped-out copy of ``x`` for the gradient of ``w``:
as large as ``x`` itself, once for every adapted layer. :func:`dropped` saves ``x`` (which the layers that share
it share), a mask of one byte per element, and computes the copy again in backward.
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
    """The same in plain operations: ``project(dropout(x, p), weight)``."""
    return project(F.dropout(x, p), weight)


def dropped(project: Project, x: Tensor, weight: Tensor, p: float) -> Tensor:
    """``project(dropout(x, p), weight)`` for a ``project`` that is linear in its first argument.

    Args:
        project: a function of the input and the weight; called again in backward.
        x: any shape.
        weight: what ``project`` multiplies by.
        p: the probability of zeroing an element, in [0, 1).
    """
    if torch.compiler.is_compiling():
        return dropped_reference(project, x, weight, p)  # the compiler decides itself what to keep
    scale = 1 / (1 - p)  # of the projection, which is smaller than x
    return recomputed(lambda x, weight, keep: project(x * keep, weight) * scale, x, weight, _keep_mask(x, p))


def _keep_mask(x: Tensor, p: float) -> Tensor:
    """A mask of the shape of ``x``, each element False with probability ``p``."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    # Four 16-bit draws from each 64-bit one: on a CPU the generator is what dropout costs. p is met to 1/65536.
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= round(p * 65536) - 32768).view(x.shape)
