"""OFT: orthogonal fine-tuning.

    W' = W R^T,    R = blockdiag(R_1, ..., R_n) orthogonal,    R_i = (I - Q_i) (I + Q_i)^-1,    Q_i skew

It turns the rows of W and keeps their lengths and angles. The entries of Q above its diagonal train, b (b - 1) / 2 for
each block of size b: in (b - 1) / 2 parameters for each matrix. Q starts at zero, so the adapted model starts as its
base. On vectors it is W (x R) + bias: the input is turned, and no second weight is formed (arXiv:2506.19847). An
embedding is turned on its output side, whose features those are: its rows become e R.

The Cayley-Neumann form replaces the inverse by the start of its series,

    R_i = I + 2 Q + 2 Q^2 + ... + 2 Q^(t-2) + Q^(t-1),

orthogonal up to higher powers of Q only, and (as in Hugging Face PEFT, whose files are read) with Q for -Q.

Constrained OFT keeps the turn small: each Q_i stays in the ball ||Q_i||_F <= eps / sqrt(n).

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280. On activations and
Cayley-Neumann: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv:2506.19847.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
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

__all__ = ["OFT"]


class OFTAdapter(WeightAdapter):
    """``oft_R`` (..., blocks, b (b - 1) / 2): the entries above the diagonal of each Q, row by row."""

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
        upper = torch.triu_indices(block_size, block_size, 1)
        self.register_buffer("places", upper[0] * block_size + upper[1], persistent=False)
        if eps < math.inf:
            self.register_state_dict_pre_hook(_store_constrained)

    def constrained(self) -> Tensor:
        """The entries, those of each block that left the ball put back onto it; their gradient passes through."""
        # Every entry is twice in Q, once with the other sign.
        norm = math.sqrt(2) * torch.linalg.vector_norm(self.oft_R.detach(), dim=-1, keepdim=True)
        radius = self.eps / math.sqrt(self.oft_R.shape[-2])
        inside = self.oft_R.detach() * (radius / norm.clamp_min(radius))
        return self.oft_R + (inside - self.oft_R.detach())

    @torch.no_grad()
    def constrain(self) -> None:
        """Put the stored entries back onto the ball, so that what is stored is what is computed with."""
        self.oft_R.copy_(self.constrained())

    def rotation(self) -> Tensor:
        """The blocks of R (..., blocks, b, b); while training each is the identity with probability ``dropout``."""
        b = self.block_size
        with torch.autocast(self.oft_R.device.type, enabled=False):
            entries = self.constrained() if self.eps < math.inf else self.oft_R
            entries = entries.to(torch.promote_types(entries.dtype, torch.float32))
            flat = entries.new_zeros(*entries.shape[:-1], b * b)
            upper = flat.index_copy(-1, self.places, entries).unflatten(-1, (b, b))
            q = upper - upper.mT
            eye = torch.eye(b, dtype=q.dtype, device=q.device)
            # (I - Q) (I + Q)^-1 = (2 I - (I + Q)) (I + Q)^-1; I + Q has no singular value below 1.
            r = _neumann(q, eye, self.terms) if self.terms else 2 * torch.linalg.inv(eye + q) - eye
            r = r.expand(*r.shape[:-3], self.blocks, b, b)
            if self.dropout and self.training:
                left = torch.rand(*r.shape[:-2], 1, 1, device=r.device) < self.dropout
                r = torch.where(left, eye, r)
        return r

    def transform(self, weight: Tensor) -> Tensor:
        r = self.rotation()
        dtype = torch.promote_types(weight.dtype, r.dtype)
        weight, r = weight.to(dtype), r.to(dtype)
        if self.on_rows:
            return (r.mT @ weight.unflatten(-2, (self.blocks, -1))).flatten(-3, -2)
        turned = weight.unflatten(-1, (self.blocks, -1)).transpose(-2, -3) @ r.mT
        return turned.transpose(-2, -3).flatten(-2)

    @property
    def modifies_weight(self) -> bool:
        return not (self.layout.has_activation and (self.layout.vectors or self.on_rows))

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.on_rows:
            return self._turn(call(*args, **kwargs))
        if args:
            return call(self._turn(args[0]), *args[1:], **kwargs)
        name, x = next(iter(kwargs.items()))
        return call(**{**kwargs, name: self._turn(x)})

    def _turn(self, x: Tensor) -> Tensor:
        """x R for vectors ``x``."""
        parts = x.reshape(-1, self.blocks, self.block_size).transpose(0, 1)
        return (parts @ self.rotation().to(x.dtype)).transpose(0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, block_size={self.block_size}"


def _store_constrained(adapter: nn.Module, *_: Any) -> None:
    """Before ``state_dict``: training without a Trainer leaves the ball with its last step."""
    assert isinstance(adapter, OFTAdapter)
    # Sharded entries need every rank, and state_dict may be called on one; the callback keeps those in the ball.
    if not hasattr(adapter.oft_R, "placements") and not torch.equal(adapter.oft_R, adapter.constrained()):
        adapter.constrain()


def _neumann(q: Tensor, eye: Tensor, terms: int) -> Tensor:
    r, power = eye.expand_as(q), eye.expand_as(q)
    for i in range(1, terms):
        power = power @ q
        r = r + (power if i == terms - 1 and i > 1 else 2 * power)
    return r


def is_at_least_2(value: Any) -> bool:
    return is_int(value) and value >= 2


class OFT(WeightMethod):
    """Each weight times a trained rotation: its rows keep their lengths and angles (arXiv:2306.07280).

    Choose it where the base must not be forgotten, subjects and control for image generation for example: what
    the neurons mean to one another stays. It costs one small product on each adapted layer's input, and merged
    nothing; on a convolution the weight is turned in every training step.

    Args:
        block_size: the side of a block; in (block_size - 1) / 2 parameters train for each matrix of in columns. Where
            it does not divide, the nearest size that does is taken, and the report says so. None for 32.
        r: the number of blocks, instead of their size.
        dropout: probability that a block stays unturned while training.
        block_share: one block for all places.
        use_cayley_neumann: the series in place of the inverse: cheaper on a GPU, orthogonal up to Q^(terms - 1).
        num_cayley_neumann_terms: how many terms of it, at least 2.
        coft: constrained OFT: no further from the base than ``eps``.
        eps: with ``coft``, the radius of the ball that the entries of a matrix's blocks stay in.

    Raises:
        ValueError: r and block_size together, or one that is not positive, a dropout outside [0, 1), too few terms, an
            eps that is not positive, or a matrix whose side has no divisor near.

    Example::

        trainer = L.Trainer(callbacks=[lp.OFT(block_size=32, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    resume_may_differ = WeightMethod.resume_may_differ | {"dropout"}

    block_size: int | None = field(
        default=None,
        kw_only=False,
        validator=optional(Check("an integer of at least 2, the least that can turn", lambda n: is_int(n) and n >= 2)),
    )
    r: int | None = field(default=None, validator=optional(positive_int))
    dropout: float = field(default=0.0, validator=probability)
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = field(
        default=5,
        validator=Check("an integer of at least 2: with one term nothing turns", lambda n: is_int(n) and n >= 2),
    )
    coft: bool = False
    eps: float = field(default=6e-5, validator=positive)

    def check(self) -> None:
        if self.block_size is not None and self.r is not None:
            raise ValueError(f"give block_size or r, not both: got block_size={self.block_size!r} and r={self.r!r}")

    def too_small(self, site: Site) -> str | None:
        if (side := self._side(site)) > 1:
            return None
        return f"{site.name!r} ({'x'.join(map(str, site.shape))}) has a side of {side}, which cannot turn"

    def _side(self, site: Site) -> int:
        """The side of the matrix that the blocks cut."""
        return site.shape[-2 if isinstance(site.layout, EmbeddingLayout) else -1]

    def build(self, site: Site) -> OFTAdapter:
        side = self._side(site)
        sizes = [d for d in range(2, side + 1) if side % d == 0]  # a block of 1 cannot turn
        wanted = self.block_size or 32
        if self.r is not None:
            wanted = max(1, side // self.r)
            size = min(sizes, key=lambda d: (abs(side // d - (self.r or 1)), side // d), default=0)
        else:
            size = min(sizes, key=lambda d: (abs(d - wanted), d), default=0)
        if not size or (size > 4 * wanted and size > 32):
            raise ValueError(
                f"{site.name!r} ({'x'.join(map(str, site.shape))}) cannot be cut into blocks of about {wanted}: {side} "
                f"divides into blocks of {', '.join(map(str, sizes[:8])) or 'none'}; exclude it, or take one of these"
            )
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else 0
        return OFTAdapter(site, size, self.block_share, terms, self.dropout, self.eps if self.coft else math.inf)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for part in self.adapters_by_weight(pl_module).values() if self.coft else ():
            assert isinstance(part, OFTAdapter)
            part.constrain()  # after the step and before a checkpoint

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        for adapter in (a.adapter for a in plan.attach):
            for part in adapter.weights().values():
                assert isinstance(part, OFTAdapter)
                wanted, got = (
                    (f"r={self.r}", part.blocks != self.r)
                    if self.r is not None
                    else (f"block_size={self.block_size or 32}", part.block_size != (self.block_size or 32))
                )
                if got:
                    plan.notes.append(
                        f"{part.site_name}: {part.blocks} blocks of {part.block_size}, as {wanted} does not divide"
                    )
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        assert isinstance(adapter, OFTAdapter)
        return f"OFT {adapter.blocks} blocks of {adapter.block_size}"
