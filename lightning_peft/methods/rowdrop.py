"""Dropout of methods that have no input of their own: of rows of the update, and of the update as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.core.adapter import WeightAdapter
from lightning_peft.core.sites import Site
from lightning_peft.methods.callback import probability

__all__ = ["RowDropAdapter", "check_drops"]


class RowDropAdapter(WeightAdapter):
    """An adapter whose update loses rows, or all of itself, while training.

    Args:
        site: the weight.
        rank_dropout: probability of leaving out a row.
        module_dropout: probability of leaving out the update in one forward.
        rank_dropout_scale: divide the rows that stay by their share.
    """

    def __init__(self, site: Site, rank_dropout: float, module_dropout: float, rank_dropout_scale: bool) -> None:
        super().__init__(site)
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.rank_dropout_scale = rank_dropout_scale
        self.rows = site.shape[-2]

    def drops(self, like: Tensor) -> Tensor | None:
        """What to multiply the rows of the update by, (out,) or a scalar; None where nothing is dropped."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        keep = torch.ones((), device=like.device)
        if self.rank_dropout:
            keep = (torch.rand(self.rows, device=like.device) >= self.rank_dropout).float()
            if self.rank_dropout_scale:
                keep = keep / keep.mean().clamp_min(1 / self.rows)
        if self.module_dropout:
            keep = keep * (torch.rand((), device=like.device) >= self.module_dropout)
        return keep


def check_drops(rank_dropout: float, module_dropout: float) -> None:
    """Refuse what is no probability."""
    probability("rank_dropout", rank_dropout)
    probability("module_dropout", module_dropout)
