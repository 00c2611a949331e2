"""AdaLoRA: low-rank adaptation that distributes ranks over the layers by importance.

    W' = W + s B diag(E) A,    A in R^{r x in}, E in R^r, B in R^{out x r},    s = alpha / (init_r + 1e-5)

The update is parametrised like a singular value decomposition. A and B are kept nearly orthogonal by the loss term
orth_reg_weight * (mean over all A and B of ||P P^T - I||_F), and the least important entries of E are set to zero. The
importance of a triplet (row of A, entry of E, column of B) is S = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji), where
s = I * U for each element:

    I <- beta1 I + (1 - beta1) |w dL/dw|,    U <- beta2 U + (1 - beta2) | |w dL/dw| - I |

During training, the average number of triplets kept per matrix falls from init_r to target_r as a cubic function of the
step; the least important ones in the whole model are masked. init_r (in + out + 1) parameters train per matrix.

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
"""

from __future__ import annotations

import importlib.util
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
from lightning_peft.core.sharded_tensors import gather_full, sharded_like
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
        dropout: probability of zeroing an element of the adapter's input during training.
        tinit: number of optimizer steps before the budget starts to fall.
        tfinal: number of optimizer steps at the end during which the ranks stay fixed.
        deltaT: number of optimizer steps between two allocations.
        beta1: smoothing factor of the importance, in (0, 1).
        beta2: smoothing factor of its uncertainty, in (0, 1).
        orth_reg_weight: weight of the orthogonality term; 0 disables it.
        total_step: total number of optimizer steps; None takes the Trainer's.

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
        self.step = 0  # optimizer steps done
        self._total = self.total_step or 0
        self._scores: dict[str, list[Tensor]] = {}  # importance and uncertainty, by parameter
        self._hooks: list[Any] = []
        if self.total_step is not None:
            self._check_schedule()

    def too_small(self, site: Site) -> str | None:
        return above_both_sides(self.init_r, "init_r", site)

    def build(self, site: Site) -> AdaLoRAAdapter:
        check_low_rank("AdaLoRA", self.init_r, "init_r", self.dropout, site)
        return AdaLoRAAdapter(site, self.init_r, self.alpha, self.dropout)

    def describe(self, adapter: WeightAdapter) -> str:
        return f"AdaLoRA r={self.init_r} -> {self.target_r}"

    def _check_schedule(self) -> None:
        if self.tinit >= self._total - self.tfinal:
            raise MisconfigurationException(
                f"AdaLoRA: tinit={self.tinit} and tfinal={self.tfinal} leave none of the {self._total} optimizer steps "
                "for reducing the ranks: lower them, or train longer"
            )

    def adapters(self, model: nn.Module) -> dict[str, AdaLoRAAdapter]:
        """This method's adapters in ``model``, by the name of the weight."""
        return {name: cast(AdaLoRAAdapter, part) for name, part in self.adapters_by_weight(model).items()}

    @torch.no_grad()
    def regularize(self, model: nn.Module) -> None:
        """Add the gradient of the orthogonality term to those of A and B."""
        if not self.orth_reg_weight:
            return
        adapters = self.adapters(model).values()
        weight = self.orth_reg_weight / max(1, sum(2 * math.prod(a.lora_A.shape[:-2]) for a in adapters))
        for adapter in adapters:
            for parameter in (adapter.lora_A, adapter.lora_B):
                full = gather_full(parameter)
                wide = full if parameter is adapter.lora_A else full.mT
                gram = wide @ wide.mT
                gram.diagonal(dim1=-2, dim2=-1).sub_(1)
                norm = torch.linalg.matrix_norm(gram, keepdim=True)
                # d ||P P^T - I||_F / dP = 2 (P P^T - I) P / ||P P^T - I||_F; 0 if P is orthogonal
                grad = (2 * weight) * (gram @ wide) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
                grad = grad if wide is full else grad.mT
                if parameter.grad is not None:
                    parameter.grad.add_(sharded_like(grad, parameter.grad))

    def budget(self, step: int, matrices: int) -> int:
        """The number of triplets to keep in a model with this many ``matrices`` after ``step`` optimizer steps."""
        if step <= self.tinit:
            return self.init_r * matrices
        left = max(0.0, 1 - (step - self.tinit) / (self._total - self.tfinal - self.tinit))
        return int((self.init_r - self.target_r) * matrices * left**3 + self.target_r * matrices)

    @torch.no_grad()
    def allocate(self, model: nn.Module) -> bool:
        """Update the scores after an optimizer step, and recompute the masks if they are due.

        Returns:
            True if the masks were recomputed.

        Raises:
            ValueError: if the number of steps is unknown.
        """
        if not self._total:
            raise ValueError("AdaLoRA needs to know the number of optimizer steps: set total_step")
        self.step += 1
        adapters, end = self.adapters(model), self._total - self.tfinal
        if self.step < end or (self.step == end and not self._scores):  # with a single step, its own scores count
            for name, adapter in adapters.items():
                for key, parameter in adapter.triplets().items():
                    self._score(f"{name}.{key}", parameter)
        due = self.tinit < self.step < end and self.step % self.deltaT == 0
        if due or self.step == end:
            self._mask(adapters)
            due = True
        if self.step == end:
            self._scores = {}  # the ranks are final
        if due or self.step > end:
            for adapter in adapters.values():
                kept = gather_full(adapter.lora_E).masked_fill(~adapter.mask, 0.0)
                adapter.lora_E.copy_(sharded_like(kept, adapter.lora_E))
        return due

    def _score(self, key: str, parameter: nn.Parameter) -> None:
        value = gather_full(parameter)
        now = (value * gather_full(parameter.grad)).abs() if parameter.grad is not None else torch.zeros_like(value)
        if key not in self._scores:
            self._scores[key] = [torch.zeros_like(now), torch.zeros_like(now)]
        importance, uncertainty = (t.to(now.device) for t in self._scores[key])
        importance = self.beta1 * importance + (1 - self.beta1) * now
        uncertainty = self.beta2 * uncertainty + (1 - self.beta2) * (now - importance).abs()
        self._scores[key] = [importance, uncertainty]

    def _mask(self, adapters: dict[str, AdaLoRAAdapter]) -> None:
        importance: dict[str, Tensor] = {}
        for name in adapters:
            a, e, b = (torch.mul(*self._scores[f"{name}.{key}"]) for key in ("lora_A", "lora_E", "lora_B"))
            importance[name] = e + a.mean(-1, keepdim=True) + b.mean(-2).unsqueeze(-1)
        every = torch.cat([score.flatten() for score in importance.values()])
        drop = every.numel() - self.budget(self.step, every.numel() // self.init_r)
        threshold = every.kthvalue(drop).values if drop else every.new_tensor(-math.inf)
        for name, adapter in adapters.items():
            adapter.mask.copy_(importance[name] > threshold)

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
        from matplotlib.figure import Figure

        ranks = self.ranks(model)
        figure = Figure(figsize=(8, 1 + 0.22 * len(ranks)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(list(ranks), list(ranks.values()))
        axes.axvline(self.target_r, color="gray", linestyle="--", label=f"target_r = {self.target_r}")
        axes.invert_yaxis()
        axes.set(xlabel="rank", xlim=(0, self.init_r), title=f"AdaLoRA: ranks after {self.step} steps")
        axes.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    # The Trainer's hooks.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.step, self._scores = 0, {}  # in a resumed run, load_state_dict restores them after this

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = self.total_step if self.total_step is not None else trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            raise MisconfigurationException(
                "AdaLoRA cannot determine the number of optimizer steps: set the Trainer's max_steps or max_epochs, or "
                "AdaLoRA(total_step=...)"
            )
        self._total = int(total)
        if getattr(trainer, "fast_dev_run", False):  # too few steps for any schedule
            self._total = max(self._total, self.tinit + self.tfinal + 1)
        self._check_schedule()
        holders = [o for o in trainer.optimizers if self._holds(o, pl_module)]
        if len(holders) != 1 or not isinstance(holders[0], Optimizer):
            raise MisconfigurationException(
                f"AdaLoRA needs exactly one torch optimizer that holds its parameters, whose steps it counts; found "
                f"{len(holders)}. Put all AdaLoRA parameters into one optimizer"
            )
        self._release()
        # Not at the end of the batch: gradients may be cleared by then, and a step that the gradient scaler skips must
        # not count.
        self._hooks = [holders[0].register_step_post_hook(lambda *_: self._after_step(trainer, pl_module))]

    def _holds(self, optimizer: Optimizer, module: nn.Module) -> bool:
        own = {id(adapter.lora_E) for adapter in self.adapters(module).values()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._holds(optimizer, pl_module):
            self.regularize(pl_module)

    def _after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.allocate(module) or not trainer.loggers or not trainer.is_global_zero:
            return
        ranks = self.ranks(module)
        metrics: dict[str, float] = {f"{self.name}/rank/{name}": float(rank) for name, rank in ranks.items()}
        metrics[f"{self.name}/rank_total"] = float(sum(ranks.values()))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send a plot of the ranks to the loggers that accept images (W&B)."""
        if trainer.is_global_zero and importlib.util.find_spec("matplotlib") is not None:
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"{self.name}/ranks", [self.plot(pl_module)])

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": []}  # hooks belong to this object's optimizer, not to a copy's

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self._scores = state_dict["step"], dict(state_dict["scores"])


class AdaLoRAAdapter(LowRankAdapter):
    """``lora_A`` (..., r, in), ``lora_E`` (..., r, 1) and ``lora_B`` (..., out, r) of one matrix.

    Attributes:
        mask: (..., r, 1), True for the triplets that are kept.
    """

    mask: Tensor

    def __init__(self, site: Site, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(site)
        *batch, rows, columns = site.shape
        self.r = r
        self.scale = alpha / (r + 1e-5)  # the 1e-5 is in the authors' code and in PEFT
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(*batch, r, columns).normal_(std=0.02))
        self.lora_E = nn.Parameter(torch.zeros(*batch, r, 1))
        self.lora_B = nn.Parameter(torch.empty(*batch, rows, r).normal_(std=0.02))
        self.register_buffer("mask", torch.ones(*batch, r, 1, dtype=torch.bool))

    def triplets(self) -> dict[str, nn.Parameter]:
        """The three parameters by name."""
        return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}"
