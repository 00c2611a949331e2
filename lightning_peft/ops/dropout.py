"""Dropout before a small projection, without storing the dropped-out input.

For ``project(dropout(x), w)``, plain autograd stores the dropped-out copy of ``x`` to compute the gradient of ``w``.
The copy is as large as ``x``, once for every adapted layer. :func:`dropped` instead stores ``x``, which several layers
share, and a mask with one byte per element, and recomputes the copy in backward. If the projection is ``F.linear``,
only the copy is computed again, not the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.ops.recompute import recomputed

__all__ = ["dropped", "dropped_reference", "keep_mask"]

Project = Callable[[Tensor, Tensor], Tensor]


def dropped_reference(project: Project, x: Tensor, weight: Tensor, p: float) -> Tensor:
    """The reference for :func:`dropped`, in plain operations."""
    return project(F.dropout(x, p), weight)


def dropped(project: Project, x: Tensor, weight: Tensor, p: float, keep: Tensor | None = None) -> Tensor:
    """Return ``project(dropout(x, p), weight)`` for a ``project`` that is linear in its first argument.

    Args:
        project: a function of the input and the weight. Functions other than ``F.linear`` are called again in backward.
        x: the input, of any shape.
        weight: the weight of the projection.
        p: the probability of zeroing an element, in [0, 1).
        keep: a mask that broadcasts to ``x``, False for the elements to zero; by default it is drawn here.
    """
    if torch.compiler.is_compiling():
        return dropped_reference(project, x, weight, p)  # the compiler itself decides what to store
    scale = 1 / (1 - p)  # applied to the projection, which is smaller than x
    keep = keep_mask(x.shape, x.device, p) if keep is None else keep
    if project is F.linear:
        out: Tensor = _DroppedLinear.apply(x, weight, keep, scale)
        return out
    return recomputed(lambda x, weight, keep: project(x * keep, weight) * scale, x, weight, keep)


class _DroppedLinear(torch.autograd.Function):
    """``scale * F.linear(x * keep, weight)``, computed in the dtype of ``x``, or of autocast.

    Backward is written in differentiable operations, so it has a backward too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, keep)
        ctx.scale = scale
        casts = torch.is_autocast_enabled(x.device.type)
        return F.linear(x * keep, weight if casts else weight.to(x.dtype)) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, keep = ctx.saved_tensors
        of_x = of_weight = None
        with torch.autocast(x.device.type, enabled=False):  # the dtype of ``grad`` is that of the products
            grad = grad * ctx.scale
            if ctx.needs_input_grad[0]:
                of_x = (grad @ weight.to(grad.dtype)).to(x.dtype) * keep
            if ctx.needs_input_grad[1]:
                dropped_out = (x * keep).to(grad.dtype).reshape(-1, x.shape[-1])
                of_weight = (grad.reshape(-1, grad.shape[-1]).t() @ dropped_out).to(weight.dtype)
        return of_x, of_weight, None, None


def keep_mask(shape: torch.Size, device: torch.device, p: float) -> Tensor:
    """Return a mask of this shape; each element is False with probability ``p``."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p)
    # Split each 64-bit draw into four 16-bit draws, because the generator is the main cost of dropout on a CPU. The
    # resulting probability is exact to 1/65536.
    draws = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[: shape.numel()] >= round(p * 65536) - 32768).view(shape)
