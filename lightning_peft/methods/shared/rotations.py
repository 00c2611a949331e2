"""Orthogonal matrices as functions of skew-symmetric ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cayley", "cayley_neumann", "skew_symmetric", "upper_places"]


def upper_places(size: int) -> Tensor:
    """The places above the diagonal of a flattened (size, size) matrix, row by row."""
    upper = torch.triu_indices(size, size, 1)
    return upper[0] * size + upper[1]


def skew_symmetric(entries: Tensor, places: Tensor, size: int) -> Tensor:
    """Q (..., size, size) with ``entries`` (..., size (size - 1) / 2) at ``places`` above its diagonal."""
    flat = entries.new_zeros(*entries.shape[:-1], size * size)
    upper = flat.index_copy(-1, places, entries).unflatten(-1, (size, size))
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1, which is orthogonal."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # Equal to 2 (I + Q)^-1 - I. The inverse is stable, because all singular values of I + Q are at least 1.
    return 2 * torch.linalg.inv(eye + q) - eye


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + 2 Q^(terms - 2) + Q^(terms - 1), which is orthogonal up to higher powers of Q."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    r, power = eye.expand_as(q), eye.expand_as(q)
    for i in range(1, terms):
        power = power @ q
        r = r + (power if i == terms - 1 and i > 1 else 2 * power)
    return r
