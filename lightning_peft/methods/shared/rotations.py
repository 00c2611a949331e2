"""Block-diagonal rotations: blocks as functions of skew-symmetric matrices, their size, and their product with W."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_peft.core.sharded_tensors import with_whole_blocks

__all__ = [
    "block_side",
    "cayley",
    "cayley_neumann",
    "in_ball",
    "rotate_columns",
    "rotate_rows",
    "skew_symmetric",
    "upper_places",
]


def block_side(where: str, side: int, size: int | None, blocks: int | None) -> int:
    """Return the divisor of ``side`` nearest to the wanted size of a block, or to the wanted number of blocks.

    Args:
        where: the name of the matrix, for errors.
        side: the side of the matrix.
        size: the wanted size; None means 32.
        blocks: the wanted number of blocks; overrides ``size`` if it is not None.

    Raises:
        ValueError: if no divisor is near.
    """
    sizes = [d for d in range(2, side + 1) if side % d == 0]  # a 1x1 block cannot rotate
    if blocks is None:
        wanted = size or 32
        found = min(sizes, key=lambda d: (abs(d - wanted), d), default=0)
    else:
        wanted = max(1, side // blocks)
        found = min(sizes, key=lambda d: (abs(side // d - blocks), side // d), default=0)
    if not found or (found > 4 * wanted and found > 32):
        raise ValueError(
            f"{where} cannot be divided into blocks of about {wanted}: the possible block sizes for {side} are "
            f"{', '.join(map(str, sizes[:8])) or 'none'}. Exclude it, or set block_size to one of these"
        )
    return found


def rotate_columns(weight: Tensor, r: Tensor) -> Tensor:
    """``weight`` (..., rows, columns) times the block-diagonal matrix of ``r`` (..., blocks, b, b)."""
    dtype = torch.promote_types(weight.dtype, r.dtype)
    parts = with_whole_blocks(weight.to(dtype), r.shape[-3]).unflatten(-1, (r.shape[-3], -1)).transpose(-2, -3)
    return (parts @ r.to(dtype)).transpose(-2, -3).flatten(-2)


def rotate_rows(weight: Tensor, r: Tensor) -> Tensor:
    """The block-diagonal matrix of ``r`` (..., blocks, b, b) times ``weight`` (..., rows, columns)."""
    dtype = torch.promote_types(weight.dtype, r.dtype)
    parts = with_whole_blocks(weight.to(dtype), r.shape[-3], dim=-2).unflatten(-2, (r.shape[-3], -1))
    return (r.to(dtype) @ parts).flatten(-3, -2)


def in_ball(entries: Tensor, radius: float) -> Tensor:
    """``entries`` (..., size (size - 1) / 2) of skew-symmetric matrices, each projected onto ||Q||_F <= ``radius``.

    The gradient passes through the projection unchanged.
    """
    fixed = entries.detach()
    norm = math.sqrt(2) * torch.linalg.vector_norm(fixed, dim=-1, keepdim=True)  # each entry is in Q twice
    return entries + (fixed * (radius / norm.clamp_min(radius)) - fixed)


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
