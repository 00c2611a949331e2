"""DyLoRA: train once, use at any rank up to r.

    W' = W + (alpha / b) B[:, :b] A[:b, :],    b uniform in 1..r, drawn anew for each optimizer step

The first b rows of A and columns of B learn to work without the later ones, so after training they can be used as a
LoRA of rank b, for every b <= r. r (in + out) parameters train per matrix, as in LoRA. In the ``frozen`` variant, a
step trains only row b of A and column b of B.

Valipour et al. 2022, "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", arXiv:2210.07558.
"""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.record import injection_state
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import nonzero, positive_int, probability
from lightning_peft.methods.families.weight import WeightMethod, above_both_sides, check_low_rank
from lightning_peft.methods.lora import LoRAAdapter
from lightning_peft.trainer.logs.keys import RANK, of_adapter

__all__ = ["DyLoRA"]


class DyLoRA(WeightMethod):
    """DyLoRA (Valipour et al. 2022, arXiv:2210.07558): a LoRA that can be cut to any lower rank after training.

    Choose it when you do not know the rank you need, or want adapters of several sizes from one training run. It costs
    as much as LoRA at rank r. Each rank gets only some of the steps, so in a short run it is less accurate than a LoRA
    trained at that rank alone: by 23, 4, 1 and 5 percentage points at ranks 1, 2, 4 and 8 after 160 steps on the same
    data. Train it for more steps than a LoRA, and compare.

    Training draws one rank b per optimizer step; all processes of a distributed run draw the same one, and so does a
    resumed run. Evaluation uses the full rank, or the one set with :meth:`truncate`. Truncated to rank b, the adapter
    is a LoRA with r = b and the same alpha.

    Without a Trainer, call ``method.sample(model, step)`` before each step.

    Args:
        r: highest rank; r (in + out) parameters train per matrix.
        alpha: the update at rank b is scaled by alpha / b.
        dropout: probability of zeroing an element of the adapter's input during training; embeddings ignore it.
        frozen: train only row b and column b in a step (the paper's faster variant). The optimizer's momentum and
            weight decay still change the others.

    Raises:
        ValueError: if r is below 1 or above both sides of a matrix, or dropout is outside [0, 1), or set for a weight
            that is not called with activations.

    Example::

        method = lp.DyLoRA(r=8, trainable=["classifier"])
        L.Trainer(callbacks=[method]).fit(module)
        lp.DyLoRA.truncate(module, 4)
    """

    parameter_count = "r (in + out)"
    resume_may_differ = WeightMethod.resume_may_differ | {"dropout", "frozen"}

    r: int = field(default=8, validator=positive_int, kw_only=False)
    alpha: float = field(default=16, validator=nonzero, kw_only=False)
    dropout: float = field(default=0.0, validator=probability)
    frozen: bool = False

    def too_small(self, site: Site) -> str | None:
        return above_both_sides(self.r, "r", site)

    def build(self, site: Site) -> DyLoRAAdapter:
        check_low_rank("DyLoRA", self.r, "r", self.dropout, site)
        return DyLoRAAdapter(site, self.r, self.alpha, self.dropout, self.frozen)

    def describe(self, adapter: WeightAdapter) -> str:
        return f"DyLoRA r<={self.r} alpha={self.alpha:g}"

    def sample(self, model: nn.Module, step: int) -> int:
        """Draw the rank for ``step``, set it in all adapters of this method, and return it."""
        rank = 1 + self.seed_for(step) % self.r
        for part in self.adapters_by_weight(model).values():
            cast(DyLoRAAdapter, part).train_at(rank)
        return rank

    def state_dict(self) -> dict[str, Any]:
        # stored, so that a resumed run draws the same ranks whatever seed its environment sets
        return {"seed": self._seed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run_seed = state_dict.get("seed", self._run_seed)  # checkpoints of earlier releases do not have it

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.sample(pl_module, trainer.global_step)

    def log_values(self, model: nn.Module) -> dict[str, float]:
        """The rank of the current step, for the loggers."""
        adapters = [cast(DyLoRAAdapter, part) for part in self.adapters_by_weight(model).values()]
        return {of_adapter(self.name, RANK): float((adapters[0].gate > 0).sum())} if adapters else {}

    @staticmethod
    def truncate(model: nn.Module, rank: int, name: str | None = None, cut: bool = False) -> None:
        """Evaluate (and merge) the DyLoRA adapters of ``model`` at a lower rank.

        Args:
            model: a model with DyLoRA adapters.
            rank: a rank between 1 and r.
            name: name of the adapter; None truncates all DyLoRA adapters.
            cut: permanently delete the higher rows and columns, so that they are not saved either.

        Raises:
            ValueError: if there is no such adapter, or ``rank`` is above its r.
        """
        record = injection_state(model)
        methods = [m for m in record.methods.values() if isinstance(m, DyLoRA)] if record is not None else []
        methods = [m for m in methods if name in (None, m.name)]
        if not methods:
            raise ValueError(f"the model has no DyLoRA adapter{'' if name is None else f' named {name!r}'} to truncate")
        positive_int.require("rank", rank)
        for method in methods:
            if rank > method.r:
                raise ValueError(
                    f"rank={rank} is above r={method.r}, the highest rank of {method.name!r}: choose a "
                    f"rank from 1 to {method.r}"
                )
        for method in methods:
            for part in method.adapters_by_weight(model).values():
                cast(DyLoRAAdapter, part).truncate(rank, cut)
            method.r = rank if cut else method.r


class DyLoRAAdapter(LoRAAdapter):
    """A and B of one matrix; only the first ``rank`` rows of A and columns of B are used.

    Attributes:
        rank: the rank used in evaluation.
        gate: factors (r, 1) during training: r / b for the first b rows of A and 0 for the rest, so that the scale
            alpha / r becomes alpha / b.
        last: (r, 1), 1 for row b and 0 elsewhere. ``gate`` and ``last`` are tensors, so that one compiled graph serves
            all ranks.
    """

    def __init__(self, site: Site, r: int, alpha: float, dropout: float = 0.0, frozen: bool = False) -> None:
        super().__init__(site, r, alpha / r, dropout)
        self.alpha = alpha
        self.rank = r
        self.frozen = frozen
        self.register_buffer("gate", torch.ones(r, 1), persistent=False)
        self.register_buffer("last", torch.ones(r, 1), persistent=False)

    gate: Tensor
    last: Tensor

    def train_at(self, rank: int) -> None:
        """Train at ``rank`` until the next call."""
        rows = torch.arange(1, self.r + 1).view(-1, 1)
        self.gate.copy_((rows <= rank) * (self.r / rank))
        self.last.copy_(rows == rank)

    def truncate(self, rank: int, cut: bool = False) -> None:
        """Evaluate at ``rank``; with ``cut``, delete the higher rows and columns."""
        self.rank = rank
        if cut:
            self.lora_A = nn.Parameter(self.lora_A[..., :rank, :].detach().clone(), self.lora_A.requires_grad)
            self.lora_B = nn.Parameter(self.lora_B[..., :rank].detach().clone(), self.lora_B.requires_grad)
            self.r, self.scale = rank, self.alpha / rank
            self.gate, self.last = torch.ones_like(self.gate[:rank]), torch.ones_like(self.last[:rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B at the current training rank, or at the evaluation rank."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if not self.training:
            if self.rank == self.r:
                return a, b
            return a[..., : self.rank, :] * (self.r / self.rank), b[..., : self.rank]
        if self.frozen:
            a = a.detach() + (a - a.detach()) * self.last  # the same values, but gradients only for row and column b
            b = b.detach() + (b - b.detach()) * self.last.mT
        return a * self.gate, b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, frozen={self.frozen}"
