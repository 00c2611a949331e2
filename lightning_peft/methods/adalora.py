"""AdaLoRA: low-rank adaptation that distributes ranks over the layers by importance.

    W' = W + s B diag(E) A,    A in R^{r x in}, E in R^r, B in R^{out x r},    s = alpha / (init_r + 1e-5)

The update is parametrised like a singular value decomposition. A and B are kept nearly orthogonal by the loss term
orth_reg_weight * (mean over all A and B of ||P P^T - I||_F). During training, the average number of triplets (row of A,
entry of E, column of B) kept per matrix falls from init_r to target_r as a cubic function of the step: the entries of E
of the least important ones in the whole model are set to zero. :mod:`lightning_peft.methods.shared.rank_allocation`
defines the importance. init_r (in + out + 1) parameters train per matrix.

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from attrs import field
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.low_rank import LowRankAdapter
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import (
    nonnegative,
    nonnegative_int,
    nonzero,
    open_unit_interval,
    optional,
    positive_int,
    probability,
)
from lightning_peft.methods.families.weight import WeightMethod, above_both_sides, check_low_rank
from lightning_peft.methods.shared.optimizer_steps import StepHook, holds_any
from lightning_peft.methods.shared.rank_allocation import RankAllocator, add_orthogonality_gradient, plot_ranks
from lightning_peft.trainer.logs.keys import RANK_PLOT, RANK_TOTAL, RANKS, of_adapter

__all__ = ["AdaLoRA"]


class AdaLoRA(WeightMethod):
    """LoRA that moves its ranks to the layers that need them most (Zhang et al. 2023, arXiv:2303.10512).

    Choose it when the parameter budget is small and layers differ in importance. It costs a higher rank during training
    (``init_r``), two running averages per adapter parameter, and some time in each step. Pruned triplets remain as
    zeros.

    The callback does all of this in a Trainer. Before each optimizer step it adds the gradient of the orthogonality
    term, exactly as a loss term would (also with gradient accumulation, mixed precision and clipping). After the step
    it updates the scores and reallocates the budget, identically on all ranks. Scores are stored in the checkpoint and
    masks in the adapters, so a run resumes exactly. Ranks are logged, and W&B gets a plot of them at the end if
    matplotlib is installed.

    Without a Trainer, set ``total_step``, call ``method.regularize(model)`` between backward and the optimizer step,
    and ``method.allocate(model)`` between the step and ``zero_grad``.

    Args:
        target_r: average rank at the end of training.
        init_r: rank of each matrix at the start.
        alpha: the update is scaled by alpha / init_r.
        dropout: probability of zeroing an element of the adapter's input during training; embeddings ignore it.
        tinit: number of optimizer steps before the budget starts to fall.
        tfinal: number of optimizer steps at the end during which the ranks stay fixed.
        deltaT: number of optimizer steps between two allocations.
        beta1: smoothing factor of the importance, in (0, 1).
        beta2: smoothing factor of its uncertainty, in (0, 1).
        orth_reg_weight: weight of the orthogonality term; 0 disables it.
        total_step: total number of optimizer steps; None takes it from the Trainer.

    Raises:
        ValueError: if target_r is above init_r, an argument is out of range, or init_r is above both sides of a matrix.
        MisconfigurationException: if tinit and tfinal together cover all steps, or the number of steps is unknown.

    Example::

        trainer = L.Trainer(callbacks=[lp.AdaLoRA(target_r=4, init_r=8, tinit=100, tfinal=300)], max_epochs=3)
    """

    parameter_count = "r (in + out + 1) at the initial rank"
    resume_may_differ = WeightMethod.resume_may_differ | {
        *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "dropout")
    }

    target_r: int = field(default=8, validator=positive_int, kw_only=False)
    init_r: int = field(default=12, validator=positive_int, kw_only=False)
    alpha: float = field(default=16, validator=nonzero)
    dropout: float = field(default=0.0, validator=probability)
    tinit: int = field(default=0, validator=nonnegative_int)
    tfinal: int = field(default=0, validator=nonnegative_int)
    deltaT: int = field(default=1, validator=positive_int)
    beta1: float = field(default=0.85, validator=open_unit_interval)
    beta2: float = field(default=0.85, validator=open_unit_interval)
    orth_reg_weight: float = field(default=0.5, validator=nonnegative)
    total_step: int | None = field(default=None, validator=optional(positive_int))

    def check(self) -> None:
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r={self.target_r} is above init_r={self.init_r}: the rank can only fall; raise init_r"
            )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._allocator = RankAllocator(self, self.total_step or 0)
        self._after_step = StepHook()
        if self.total_step is not None:
            self._allocator.check()

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return self._allocator.step

    def too_small(self, site: Site) -> str | None:
        return above_both_sides(self.init_r, "init_r", site)

    def build(self, site: Site) -> AdaLoRAAdapter:
        check_low_rank("AdaLoRA", self.init_r, "init_r", self.dropout, site)
        return AdaLoRAAdapter(site, self.init_r, self.alpha, self.dropout)

    def describe(self, adapter: WeightAdapter) -> str:
        return f"AdaLoRA r={self.init_r} -> {self.target_r}"

    def adapters(self, model: nn.Module) -> dict[str, AdaLoRAAdapter]:
        """This method's adapters in ``model``, by the name of the weight."""
        return {name: cast(AdaLoRAAdapter, part) for name, part in self.adapters_by_weight(model).items()}

    def regularize(self, model: nn.Module) -> None:
        """Add the gradient of the orthogonality term to those of A and B."""
        if self.orth_reg_weight:
            add_orthogonality_gradient(self.adapters(model).values(), self.orth_reg_weight)

    def allocate(self, model: nn.Module) -> bool:
        """Update the scores after an optimizer step, and recompute the masks if they are due.

        Returns:
            True if the masks were recomputed.

        Raises:
            ValueError: if the number of steps is unknown.
        """
        if not self._allocator.total:
            raise ValueError("AdaLoRA needs to know the number of optimizer steps: set total_step")
        return self._allocator.after_step(self.adapters(model))

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The current rank of each adapted weight; for stacked matrices (experts), the sum."""
        adapters = self.adapters(model)
        counts = torch.stack([a.mask.sum() for a in adapters.values()]).tolist() if adapters else []
        return dict(zip(adapters, counts))

    def plot(self, model: nn.Module, path: str | Path | None = None) -> Any:
        """Plot the ranks per layer as bars; requires matplotlib.

        Args:
            model: the trained model.
            path: file to save the plot to; None does not save it.

        Returns:
            The matplotlib figure.
        """
        return plot_ranks(self.ranks(model), self, self.step, path)

    # The Trainer's hooks.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._allocator.restart()  # in a resumed run, load_state_dict restores it after this

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = self.total_step if self.total_step is not None else trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            raise MisconfigurationException(
                "AdaLoRA cannot determine the number of optimizer steps: set the Trainer's max_steps or max_epochs, or "
                "AdaLoRA(total_step=...)"
            )
        if getattr(trainer, "fast_dev_run", False):  # too few steps for any schedule
            total = max(total, self.tinit + self.tfinal + 1)
        self._allocator.total = int(total)
        self._allocator.check()
        self._after_step.attach(
            "AdaLoRA", trainer.optimizers, self._entries(pl_module), lambda: self._allocate(pl_module)
        )

    def _entries(self, module: nn.Module) -> list[nn.Parameter]:
        return [adapter.lora_E for adapter in self.adapters(module).values()]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if holds_any(optimizer, self._entries(pl_module)):
            self.regularize(pl_module)

    def _allocate(self, module: nn.Module) -> None:
        self.allocate(module)

    def log_values(self, model: nn.Module) -> dict[str, float]:
        """The rank of each weight, and their sum, for the loggers."""
        ranks = self.ranks(model)
        values = {of_adapter(self.name, RANKS, weight): float(rank) for weight, rank in ranks.items()}
        return {**values, of_adapter(self.name, RANK_TOTAL): float(sum(ranks.values()))}

    def log_figures(self, model: nn.Module) -> dict[str, Any]:
        """The plot of the ranks, for the loggers."""
        return {of_adapter(self.name, RANK_PLOT): self.plot(model)}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._after_step.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self._allocator.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._allocator.step, self._allocator.scores = state_dict["step"], dict(state_dict["scores"])


class AdaLoRAAdapter(LowRankAdapter):
    """``lora_A`` (..., r, in), ``lora_E`` (..., r, 1) and ``lora_B`` (..., out, r) of one matrix.

    Attributes:
        mask: (..., r, 1), True for the triplets that are kept.
    """

    mask: Tensor

    neutral = {"lora_E": 0.0}

    def __init__(self, site: Site, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        *batch, rows, columns = site.shape
        self.r = r
        self.scale = alpha / (r + 1e-5)  # the 1e-5 is in the authors' code and in PEFT
        self.lora_A = nn.Parameter(torch.empty(*batch, r, columns).normal_(std=0.02))
        self.lora_E = nn.Parameter(torch.zeros(*batch, r, 1))
        self.lora_B = nn.Parameter(torch.empty(*batch, rows, r).normal_(std=0.02))
        self.register_buffer("mask", torch.ones(*batch, r, 1, dtype=torch.bool))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}"
