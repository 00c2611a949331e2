"""OFT: orthogonal fine-tuning.

    W' = W R^T,    R = blockdiag(R_1, ..., R_n) orthogonal,    R_i = (I - Q_i) (I + Q_i)^-1,    Q_i skew

R rotates the weight vector of each output, which keeps their lengths and the angles between them. The entries of Q_i
above the diagonal train, b (b - 1) / 2 for each block of size b: in (b - 1) / 2 parameters per matrix. Q starts at
zero, so the adapted model initially computes what the base computes. On vectors the layer computes W (x R) + bias: it
rotates its input and needs no second weight matrix (arXiv:2506.19847). An embedding is rotated on its output side: a
looked-up vector e becomes e R.

The Cayley-Neumann form replaces the inverse by the first terms of its series,

    R_i = I + 2 Q + 2 Q^2 + ... + 2 Q^(t-2) + Q^(t-1),

which is orthogonal only up to higher powers of Q. Q has the opposite sign here, as in Hugging Face PEFT's files.

Constrained OFT limits the rotation: each Q_i stays in the ball ||Q_i||_F <= eps / sqrt(n).

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280. On activations and
Cayley-Neumann: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv:2506.19847.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.module_io import with_input
from lightning_peft.core.sharded_tensors import distribute_like, on_full_values, with_whole_blocks
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import (
    Check,
    is_int,
    optional,
    positive,
    positive_int,
    probability,
)
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.shared.rotations import (
    block_side,
    cayley,
    cayley_neumann,
    in_ball,
    rotate_columns,
    rotate_rows,
    skew_symmetric,
    upper_places,
)

__all__ = ["OFT"]


class OFTAdapter(WeightAdapter):
    """``oft_R`` (..., blocks, b (b - 1) / 2): the entries above the diagonal of each Q_i, row by row."""

    neutral = {"oft_R": 0.0}  # the rotation is the identity
    places: Tensor

    def __init__(self, site: Site, block_size: int, share: bool, terms: int, dropout: float, eps: float) -> None:
        super().__init__(site)
        self.on_rows = isinstance(site.layout, EmbeddingLayout)
        self.block_size = block_size
        self.terms = terms
        self.dropout = dropout
        self.eps = eps
        *batch, rows, columns = site.shape
        self.blocks = (rows if self.on_rows else columns) // block_size
        entries = block_size * (block_size - 1) // 2
        self.oft_R = nn.Parameter(torch.zeros(*batch, 1 if share else self.blocks, entries))
        self.register_buffer("places", upper_places(block_size), persistent=False)
        if eps < math.inf:
            self.register_state_dict_pre_hook(_store_constrained)

    def constrained(self) -> Tensor:
        """``oft_R`` with each block projected onto its ball; the gradient passes through the projection unchanged."""
        return in_ball(self.oft_R, self.eps / math.sqrt(self.oft_R.shape[-2]))

    @torch.no_grad()
    def constrain(self) -> None:
        """Project ``oft_R`` in place, so that the stored values equal those used in the forward pass."""
        self.oft_R.copy_(self.constrained())

    def rotation(self) -> Tensor:
        """The blocks of R (..., blocks, b, b); in training each is the identity with probability ``dropout``."""
        b = self.block_size
        with torch.autocast(self.oft_R.device.type, enabled=False):
            entries = self.constrained() if self.eps < math.inf else self.oft_R
            entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
            q = skew_symmetric(entries, self.places, b)
            r = on_full_values(partial(cayley_neumann, terms=self.terms) if self.terms else cayley, q)
            r = r.expand(*r.shape[:-3], self.blocks, b, b)
            if self.dropout and self.training:
                left = torch.rand(*r.shape[:-2], 1, 1, device=r.device) < self.dropout
                eye = torch.eye(b, dtype=r.dtype, device=r.device)
                r = torch.where(distribute_like(left, r), distribute_like(eye, r), r)
        return r

    def transform(self, weight: Tensor) -> Tensor:
        r = self.rotation()
        return rotate_rows(weight, r.mT) if self.on_rows else rotate_columns(weight, r.mT)

    @property
    def modifies_weight(self) -> bool:
        return not (self.layout.has_activation and (self.layout.vectors or self.on_rows))

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.on_rows:
            return self._rotate(call(*args, **kwargs))
        args, kwargs = with_input(args, kwargs, self._rotate)
        return call(*args, **kwargs)

    def _rotate(self, x: Tensor) -> Tensor:
        """x R for vectors ``x``."""
        parts = with_whole_blocks(x, self.blocks).reshape(-1, self.blocks, self.block_size).transpose(0, 1)
        return (parts @ self.rotation().to(x.dtype)).transpose(0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, block_size={self.block_size}"


def _store_constrained(adapter: nn.Module, *_: Any) -> None:
    """Project before ``state_dict``: without a Trainer, the last optimizer step may have left the ball."""
    assert isinstance(adapter, OFTAdapter)
    # Sharded parameters would need a collective, but state_dict may be called on one rank. The callback projects them.
    if not hasattr(adapter.oft_R, "placements") and not torch.equal(adapter.oft_R, adapter.constrained()):
        adapter.constrain()


class OFT(WeightMethod):
    """Orthogonal fine-tuning: multiplies each weight by a trained block-diagonal rotation (arXiv:2306.07280).

    Choose it when the model must keep what the base knows, for example to teach an image generator new subjects: the
    lengths of the weight vectors and the angles between them do not change. It costs one small product on the input of
    each adapted layer; for convolutions, it rotates the whole weight in every training step. Merged, it costs nothing.

    Args:
        block_size: side of a block; in (block_size - 1) / 2 parameters train per matrix. If it does not divide the
            matrix's side, the closest divisor is used, and the report notes it. None means 32, unless r is set.
        r: number of blocks; set this instead of block_size.
        dropout: probability of replacing a block by the identity during training.
        block_share: use one trained block for all positions of the block diagonal.
        use_cayley_neumann: use the truncated series instead of the inverse. It is cheaper on a GPU, but orthogonal only
            up to Q^(terms - 1).
        num_cayley_neumann_terms: number of terms of the series, at least 2.
        coft: constrained OFT: limit how far the rotation moves the weight from the base.
        eps: radius of the ball for ``coft``; each block gets the radius eps / sqrt(number of blocks).

    Raises:
        ValueError: if both r and block_size are given, an argument is out of range, or no divisor of a matrix's side is
            close to the requested block size.

    Example::

        trainer = L.Trainer(callbacks=[lp.OFT(block_size=32, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    parameter_count = "in (b - 1) / 2 with blocks of size b"
    resume_may_differ = WeightMethod.resume_may_differ | {"dropout"}

    block_size: int | None = field(
        default=None,
        kw_only=False,
        validator=optional(
            Check("an integer of at least 2, since a 1x1 block cannot rotate", lambda n: is_int(n) and n >= 2)
        ),
    )
    r: int | None = field(default=None, validator=optional(positive_int))
    dropout: float = field(default=0.0, validator=probability)
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = field(
        default=5,
        validator=Check("an integer of at least 2, since one term is the identity", lambda n: is_int(n) and n >= 2),
    )
    coft: bool = False
    eps: float = field(default=6e-5, validator=positive)

    def check(self) -> None:
        if self.block_size is not None and self.r is not None:
            raise ValueError(
                f"block_size={self.block_size!r} and r={self.r!r} both set the block size: remove one of the two"
            )

    def too_small(self, site: Site) -> str | None:
        if (side := self._side(site)) > 1:
            return None
        return f"{site.name!r} ({'x'.join(map(str, site.shape))}) has a side of {side}, which cannot be rotated"

    def _side(self, site: Site) -> int:
        """The side of the matrix that is divided into blocks."""
        return site.shape[-2 if isinstance(site.layout, EmbeddingLayout) else -1]

    def build(self, site: Site) -> OFTAdapter:
        size = block_side(
            f"{site.name!r} ({'x'.join(map(str, site.shape))})", self._side(site), self.block_size, self.r
        )
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else 0
        return OFTAdapter(site, size, self.block_share, terms, self.dropout, self.eps if self.coft else math.inf)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for part in self.adapters_by_weight(pl_module).values() if self.coft else ():
            assert isinstance(part, OFTAdapter)
            part.constrain()  # here, so that checkpoints written after this step hold the projected values

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        for adapter in (a.adapter for a in plan.attach):
            for part in adapter.weights().values():
                assert isinstance(part, OFTAdapter)
                argument, got = ("r", part.blocks) if self.r is not None else ("block_size", part.block_size)
                if got != (wanted := self.r or self.block_size or 32):
                    plan.notes.append(
                        f"{part.site_name}: {part.blocks} blocks of {part.block_size}, since {argument}={wanted} does "
                        "not divide"
                    )
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        assert isinstance(adapter, OFTAdapter)
        return f"OFT {adapter.blocks} blocks of {adapter.block_size}"
