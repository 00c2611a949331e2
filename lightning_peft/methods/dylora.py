"""DyLoRA: one training, every rank up to r.

    W' = W + (alpha / b) B[:, :b] A[:b, :],    b uniform in 1..r, drawn anew for each optimizer step

The first rows of A and columns of B learn to do without the later ones, so that after training any b <= r can be cut
off and used as a LoRA of rank b. r (in + out) parameters for each matrix, as in LoRA. In the ``frozen`` variant
a step trains only row b of A and column b of B.

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

__all__ = ["DyLoRA"]


class DyLoRA(WeightMethod):
    """DyLoRA (Valipour et al. 2022, arXiv:2210.07558): a LoRA that can be cut to any lower rank after training.

    Choose it when the rank has to be found, or when adapters of several sizes are wanted from one training. It costs
    what LoRA of rank r costs. Each rank gets only a part of the steps, so a short run costs accuracy against a LoRA
    trained at that rank alone: after 160 steps on the same data 23, 4, 1 and 5 points at ranks 1, 2, 4 and 8. Train
    longer than a LoRA, and compare.

    Training draws a rank for each optimizer step, the same on all ranks of a distributed run and in a resumed one.
    Evaluation uses the full rank, or the one set with :meth:`truncate`. Cut to rank b it is a LoRA with r = b and the
    same alpha.

    Without a Trainer: call ``method.sample(model, step)`` before each step.

    Args:
        r: the highest rank; r (in + out) parameters train for each matrix.
        alpha: the update of rank b is scaled by alpha / b.
        dropout: probability of dropping an element of the adapter's input while training.
        frozen: train only the b-th row and column in a step, the paper's faster variant. The optimizer's momentum
            and weight decay still move the others.

    Raises:
        ValueError: a rank below 1 or above both sides of the matrix, a dropout outside [0, 1), or a dropout on a
            weight that is not called with activations.

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
        """Draw the rank that the adapters train at in ``step``, and set it; returns it."""
        rank = 1 + self.seed_for(step) % self.r
        for part in self.adapters_by_weight(model).values():
            cast(DyLoRAAdapter, part).train_at(rank)
        return rank

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed()}  # a resumed run draws the same ranks under any seed of its environment

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run_seed = state_dict.get("seed", self._run_seed)  # checkpoints of earlier releases have none

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.sample(pl_module, trainer.global_step)

    @staticmethod
    def truncate(model: nn.Module, rank: int, name: str | None = None, cut: bool = False) -> None:
        """Evaluate the DyLoRA adapters of ``model`` at a lower rank; merging folds that rank.

        Args:
            model: a model with DyLoRA adapters.
            rank: from 1 to r.
            name: the adapter; by default all that are DyLoRA.
            cut: throw the higher rows and columns away for good, so that they are not stored either.

        Raises:
            ValueError: there is no such adapter, or it does not have that rank.
        """
        record = injection_state(model)
        methods = [m for m in record.methods.values() if isinstance(m, DyLoRA)] if record is not None else []
        methods = [m for m in methods if name in (None, m.name)]
        if not methods:
            raise ValueError(f"the model has no DyLoRA adapter{'' if name is None else f' named {name!r}'} to truncate")
        positive_int.require("rank", rank)
        for method in methods:
            if rank > method.r:
                raise ValueError(f"rank={rank} is above r={method.r}, the highest rank that {method.name!r} has")
        for method in methods:
            for part in method.adapters_by_weight(model).values():
                cast(DyLoRAAdapter, part).truncate(rank, cut)
            method.r = rank if cut else method.r


class DyLoRAAdapter(LoRAAdapter):
    """A and B of one matrix, of which the first ``rank`` rows and columns run.

    Attributes:
        rank: what evaluation uses.
        gate: (r, 1), while training: r / b for the first b rows of A and 0 for the rest, so that the scale of
            alpha / r becomes alpha / b.
        last: (r, 1), 1 for row b and 0 elsewhere. Tensors and no numbers: compiled code serves all ranks.
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
        """Train at ``rank`` from now on."""
        rows = torch.arange(1, self.r + 1).view(-1, 1)
        self.gate.copy_((rows <= rank) * (self.r / rank))
        self.last.copy_(rows == rank)

    def truncate(self, rank: int, cut: bool = False) -> None:
        """Evaluate at ``rank``; ``cut`` drops the rest."""
        self.rank = rank
        if cut:
            self.lora_A = nn.Parameter(self.lora_A[..., :rank, :].detach().clone(), self.lora_A.requires_grad)
            self.lora_B = nn.Parameter(self.lora_B[..., :rank].detach().clone(), self.lora_B.requires_grad)
            self.r, self.scale = rank, self.alpha / rank
            self.gate, self.last = torch.ones_like(self.gate[:rank]), torch.ones_like(self.last[:rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they run: of the rank that trains, or that evaluation uses."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if not self.training:
            if self.rank == self.r:
                return a, b
            return a[..., : self.rank, :] * (self.r / self.rank), b[..., : self.rank]
        if self.frozen:
            a = a.detach() + (a - a.detach()) * self.last  # the same values; gradients in row and column b alone
            b = b.detach() + (b - b.detach()) * self.last.mT
        return a * self.gate, b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, frozen={self.frozen}"
