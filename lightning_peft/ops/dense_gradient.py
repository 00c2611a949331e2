"""Convert a sparse gradient to a dense one.

``nn.Embedding(sparse=True)`` returns a sparse gradient for its weight. If the weight is computed by an adapter,
backward continues through the adapter's operations, which do not accept sparse gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["dense_gradient"]


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.to_dense() if gradient.is_sparse else gradient


def dense_gradient(tensor: Tensor) -> Tensor:
    """Return ``tensor``; in backward, a sparse gradient is converted to a dense one."""
    out: Tensor = _DenseGradient.apply(tensor)
    return out
