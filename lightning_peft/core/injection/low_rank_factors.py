"""Compute a weight adapter's update as a matrix or as a low-rank product, exact or truncated by SVD."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter

__all__ = ["Factors", "LowRankReport", "evaluating", "low_rank_factors", "singular_values", "weight_delta"]

Factors = tuple[Tensor, Tensor]  # A (..., k, in) and B (..., out, k)


@dataclass
class LowRankReport:
    """How well low-rank factors approximate the updates they replace.

    Attributes:
        ranks: the rank of each weight's factors.
        errors: the relative error for each weight: Frobenius norm of the difference over that of the update.
        norms: the Frobenius norm of each weight's update.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The relative error over all weights together."""
        missing = sum((self.errors[name] * self.norms[name]) ** 2 for name in self.errors)
        whole = sum(norm**2 for norm in self.norms.values())
        return (missing / whole) ** 0.5 if whole else 0.0

    def __rich__(self) -> Table:
        table = Table("weight", "rank", "relative error", title="Low-rank factors", title_justify="left")
        for name, rank in self.ranks.items():
            table.add_row(name, str(rank), f"{self.errors[name]:.3g}")
        table.add_section()
        table.add_row("all", str(sum(self.ranks.values())), f"{self.error:.3g}")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put ``modules`` in eval mode inside the context, so that there is no dropout or sampling."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@torch.no_grad()
def weight_delta(part: WeightAdapter, weight: Tensor) -> Tensor:
    """Return the update that ``part`` adds to the matrix (..., out, in) of ``weight``, in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    matrix = part.layout.matrix(weight.detach()).to(wide)
    with evaluating(part):
        if part.transform_is_sum:
            return part.delta(matrix).to(wide)  # exact, whereas W + D - W would be rounded
        return part.transform(matrix).to(wide) - matrix


@torch.no_grad()
def low_rank_factors(
    given: Factors | Tensor, r: int | None = None, energy: float | None = None
) -> tuple[Factors, float, float]:
    """Compute low-rank factors of a matrix, or of the product of ``given`` factors.

    Without ``r`` and ``energy``, given factors are returned unchanged, and a matrix is factored at its numerical rank.

    Args:
        given: a matrix (..., out, in), or factors.
        r: the maximum rank; the largest singular values are kept.
        energy: keep the fewest singular values whose squares sum to this share of the total.

    Returns:
        The factors, each scaled by the square roots of the singular values; the relative error in the Frobenius norm;
        and the norm of the matrix.
    """
    if isinstance(given, Tensor):
        u, s, vh = torch.linalg.svd(given, full_matrices=False)
    else:
        a, b = given
        smaller = min(a.shape[-1], b.shape[-2])
        if r is None and energy is None and a.shape[-2] <= smaller:
            return given, 0.0, float(torch.linalg.matrix_norm(_core(a, b)[1]).norm())
        (left, right), core = _core(a, b)
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        u, vh = left @ u, vh @ right.mT
    squares = s.double() ** 2
    total = squares.sum(-1, keepdim=True)
    if energy is None:
        rank = int(
            (s > s.amax(-1, keepdim=True) * max(u.shape[-2], vh.shape[-1]) * torch.finfo(s.dtype).eps).sum(-1).max()
        )
    else:
        rank = int(((squares.cumsum(-1) < energy * total * (1 - 1e-12)).sum(-1) + 1).max())
    rank = max(1, min(rank, s.shape[-1], r or s.shape[-1]))
    root = s[..., :rank].sqrt()
    norm = float(total.sum().sqrt())
    error = float(squares[..., rank:].sum().sqrt()) / norm if norm else 0.0
    return (root[..., :, None] * vh[..., :rank, :], u[..., :rank] * root[..., None, :]), error, norm


@torch.no_grad()
def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values (..., r) of the product of A (..., r, in) and B (..., out, r), largest first."""
    return torch.linalg.svdvals(_core(a, b)[1])


def _core(a: Tensor, b: Tensor) -> tuple[Factors, Tensor]:
    """Return Q, P with orthonormal columns and a small matrix M, so that B A = Q M P^T.

    The singular values of M are those of B A, and its SVD is much cheaper than that of the full matrix.
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    return (left, right), upper @ lower.mT
