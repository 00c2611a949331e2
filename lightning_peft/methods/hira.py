"""HiRA: Hadamard high-rank adaptation.

    W' = W + W * (B A),    A in R^{r x in}, B in R^{out x r}, * elementwise

A low-rank matrix scales every element of W, so the update has a rank of up to r rank(W) with LoRA's r (in + out)
parameters. B starts at zero (for an embedding, A does), so the adapted model initially computes what the base computes.

Huang, Ko, Zhuang, Tang and Zhang 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
Models", ICLR 2025, https://openreview.net/forum?id=TwJrTz9cRS.
"""

from __future__ import annotations

from functools import partial

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.effective_weights import values_before
from lightning_peft.core.adapters.low_rank import dropped_input
from lightning_peft.core.targeting.layouts import ConvLayout, EmbeddingLayout
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import positive_int, probability
from lightning_peft.methods.families.ranked import RankOnlyMethod
from lightning_peft.methods.families.weight import check_low_rank
from lightning_peft.methods.shared.kernel_factors import uniform
from lightning_peft.ops.recompute import recomputed

__all__ = ["HiRA"]


class HiRAAdapter(WeightAdapter):
    """``hira_A`` (..., r, in) and ``hira_B`` (..., out, r)."""

    neutral = {"hira_B": 0.0}

    def __init__(self, site: Site, r: int, dropout: float) -> None:
        super().__init__(site)
        *batch, rows, columns = site.shape
        looked_up = isinstance(site.layout, EmbeddingLayout)
        self.r = r
        self.dropout = 0.0 if looked_up else dropout
        self.hira_A = nn.Parameter(torch.zeros(r, columns)) if looked_up else uniform(*batch, r, columns)
        self.hira_B = nn.Parameter(torch.randn(rows, r) if looked_up else torch.zeros(*batch, rows, r))

    def delta(self, weight: Tensor) -> Tensor:
        # Recomputed in backward: the product of the factors is as large as the weight.
        return recomputed(lambda w, a, b: w * (b @ a), weight, self.hira_A, self.hira_B)

    @property
    def needs_input(self) -> str | None:
        return f"dropout={self.dropout}" if self.dropout else None

    @property
    def modifies_weight(self) -> bool:
        return super().modifies_weight or not self.dropout  # without dropout one product is enough

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        (weight,) = values_before(host, self, self.parameter)
        assert weight is not None
        update = self.delta(self.layout.matrix(weight))
        product = partial(self.layout.down, host)
        z = dropped_input(product, x, update, self.dropout) if self.training else product(x, update)
        return y + z.to(y.dtype)

    def batched_class(self, host: nn.Module) -> None:
        return None  # the update depends on the weight after the other adapters of each row


class HiRA(RankOnlyMethod):
    """A low-rank matrix that scales every element of the weight, an update of high rank (ICLR 2025).

    Choose it when LoRA is limited by its rank and the base is strong: it rescales every weight, at LoRA's number of
    parameters. It costs a full-size update matrix in every training step, and needs a learning rate about ten times
    LoRA's. Merged, it costs nothing.

    Args:
        r: rank of B A; r (in + out) parameters train per matrix.
        dropout: probability of dropping an element of the adapter's input during training, on linear layers and on
            convolutions without groups; embeddings ignore it.

    Raises:
        ValueError: if r is below 1 or above both sides of a matrix, or a dropout is outside [0, 1) or set
            for a weight that cannot have it.

    Example::

        trainer = L.Trainer(callbacks=[lp.HiRA(r=32, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    parameter_count = "r (in + out)"
    resume_may_differ = RankOnlyMethod.resume_may_differ | {"dropout"}

    r: int = field(default=32, validator=positive_int, kw_only=False)
    dropout: float = field(default=0.0, validator=probability)

    def build(self, site: Site) -> HiRAAdapter:
        r = self.rank_at(site)
        check_low_rank("HiRA", r, "r", self.dropout, site)
        layout = site.layout
        if (
            self.dropout
            and isinstance(layout, ConvLayout)
            and (type(layout) is not ConvLayout or site.module.groups != 1)
        ):
            raise ValueError(
                f"dropout={self.dropout} is not supported on {site.name!r}, a transposed or grouped convolution. Set "
                "dropout=0, or exclude it and add a second HiRA with dropout=0 for it"
            )
        return HiRAAdapter(site, r, self.dropout)
