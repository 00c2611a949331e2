"""A dense gradient for what is looked up with ``nn.Embedding(sparse=True)``, since backward goes on through it."""

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
    """``tensor`` itself; a sparse gradient becomes dense on the way back."""
    out: Tensor = _DenseGradient.apply(tensor)
    return out
