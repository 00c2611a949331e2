"""Run a small function for its gradient twice instead of keeping what it makes on the way.

A low-rank update is cheap to compute and large to keep: its factors' product is as large as the weight, its hidden
activations grow with the batch. :func:`recomputed` keeps the function's inputs alone, which are parameters and the
activation that the layer has anyway, and computes the rest again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, keeping for backward nothing but ``inputs``.

    Args:
        function: gives one tensor; called again in backward, so it must not draw random numbers, and every tensor
            that needs a gradient must be among the inputs.
        inputs: tensors, of which any may need a gradient.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)  # the compiler decides itself what to keep
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
        again = torch.is_grad_enabled()  # a gradient of the gradient is wanted
        needs = ctx.needs_input_grad[1:]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            # New tensors in either case, so that the gradient of one input does not run on into another.
            inputs = [
                t if not need else t.view_as(t) if again else t.detach().requires_grad_()
                for t, need in zip(ctx.saved_tensors, needs)
            ]
            output = ctx.function(*inputs)
        wanted = [t for t, need in zip(inputs, needs) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=again))
        return None, *(next(grads) if need else None for need in needs)
