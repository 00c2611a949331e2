"""Recompute a small function in backward instead of storing its intermediate results.

A low-rank update is cheap to compute but large to store: the product of its factors is as large as the weight, and its
hidden activations grow with the batch. :func:`recomputed` stores only the inputs of the function, which are parameters
and an activation that the layer stores anyway, and recomputes the rest in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``function(*inputs)``, storing only ``inputs`` for backward.

    Args:
        function: returns one tensor. It is called again in backward, so it must not draw random numbers, and every
            tensor that needs a gradient must be one of the inputs.
        inputs: tensors; any of them may need a gradient.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)  # the compiler itself decides what to store
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        device = inputs[0].device.type
        ctx.function = function
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # True for a second-order gradient (create_graph=True)
        needs = ctx.needs_input_grad[1:]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            # Use new tensors in both cases, so that a gradient does not flow from one input into another that it was
            # computed from.
            inputs = [
                t if not need else t.view_as(t) if again else t.detach().requires_grad_()
                for t, need in zip(ctx.saved_tensors, needs)
            ]
            output = ctx.function(*inputs)
        wanted = [t for t, need in zip(inputs, needs) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=again))
        return None, *(next(grads) if need else None for need in needs)
