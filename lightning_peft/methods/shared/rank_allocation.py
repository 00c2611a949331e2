"""AdaLoRA's allocation: importance scores, the falling budget, and the masks that keep the most important triplets.

A triplet is a row of A, an entry of E and a column of B. Its importance is S = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)
with s = I * U for each element:

    I <- beta1 I + (1 - beta1) |w dL/dw|,    U <- beta2 U + (1 - beta2) | |w dL/dw| - I |

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.core.sharded_tensors import gather_full, sharded_like

__all__ = ["RankAllocator", "Schedule", "Triplets", "add_orthogonality_gradient", "plot_ranks"]


class Triplets(Protocol):
    """An adapter whose ranks are allocated: A (..., r, in), E (..., r, 1) and B (..., out, r); mask is like E."""

    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    mask: Tensor


class Schedule(Protocol):
    """The arguments of an allocation; see :class:`lightning_peft.AdaLoRA`."""

    target_r: int
    init_r: int
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float


class RankAllocator:
    """Scores the triplets of some adapters after each optimizer step, and masks those that are over the budget.

    Attributes:
        step: optimizer steps done.
        total: the total number of optimizer steps; 0 if unknown.
        scores: importance and uncertainty, by parameter.
    """

    def __init__(self, schedule: Schedule, total: int) -> None:
        self.schedule = schedule
        self.total = total
        self.restart()

    def restart(self) -> None:
        """Forget all steps and scores."""
        self.step = 0
        self.scores: dict[str, list[Tensor]] = {}

    def check(self) -> None:
        """Check that the schedule fits into the total number of steps.

        Raises:
            MisconfigurationException: if tinit and tfinal together cover all steps.
        """
        tinit, tfinal = self.schedule.tinit, self.schedule.tfinal
        if tinit >= self.total - tfinal:
            raise MisconfigurationException(
                f"AdaLoRA: tinit={tinit} and tfinal={tfinal} leave none of the {self.total} optimizer steps "
                "for reducing the ranks: lower them, or train longer"
            )

    def budget(self, matrices: int) -> int:
        """The number of triplets to keep in a model with this many ``matrices`` after the current step."""
        plan = self.schedule
        if self.step <= plan.tinit:
            return plan.init_r * matrices
        left = max(0.0, 1 - (self.step - plan.tinit) / (self.total - plan.tfinal - plan.tinit))
        return int((plan.init_r - plan.target_r) * matrices * left**3 + plan.target_r * matrices)

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Triplets]) -> bool:
        """Update the scores after an optimizer step; recompute the masks if they are due, and return True if so."""
        self.step += 1
        end = self.total - self.schedule.tfinal
        if self.step < end or (self.step == end and not self.scores):  # with a single step, its own scores count
            for name, adapter in adapters.items():
                for key in ("lora_A", "lora_E", "lora_B"):
                    self._score(f"{name}.{key}", getattr(adapter, key))
        due = self.step == end or (self.schedule.tinit < self.step < end and self.step % self.schedule.deltaT == 0)
        if due:
            self._mask(adapters)
        if self.step == end:
            self.scores = {}  # the ranks are final
        if due or self.step > end:
            for adapter in adapters.values():
                kept = gather_full(adapter.lora_E).masked_fill(~adapter.mask, 0.0)
                adapter.lora_E.copy_(sharded_like(kept, adapter.lora_E))
        return due

    def _score(self, key: str, parameter: nn.Parameter) -> None:
        value = gather_full(parameter)
        now = (value * gather_full(parameter.grad)).abs() if parameter.grad is not None else torch.zeros_like(value)
        if key not in self.scores:
            self.scores[key] = [torch.zeros_like(now), torch.zeros_like(now)]
        importance, uncertainty = (t.to(now.device) for t in self.scores[key])
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        importance = beta1 * importance + (1 - beta1) * now
        uncertainty = beta2 * uncertainty + (1 - beta2) * (now - importance).abs()
        self.scores[key] = [importance, uncertainty]

    def _mask(self, adapters: Mapping[str, Triplets]) -> None:
        importance: dict[str, Tensor] = {}
        for name in adapters:
            a, e, b = (torch.mul(*self.scores[f"{name}.{key}"]) for key in ("lora_A", "lora_E", "lora_B"))
            importance[name] = e + a.mean(-1, keepdim=True) + b.mean(-2).unsqueeze(-1)
        every = torch.cat([score.flatten() for score in importance.values()])
        drop = every.numel() - self.budget(every.numel() // self.schedule.init_r)
        threshold = every.kthvalue(drop).values if drop else every.new_tensor(-math.inf)
        for name, adapter in adapters.items():
            adapter.mask.copy_(importance[name] > threshold)


@torch.no_grad()
def add_orthogonality_gradient(adapters: Iterable[Triplets], weight: float) -> None:
    """Add the gradient of ``weight`` * (mean over all A and B of ||P P^T - I||_F) to those of A and B."""
    adapters = list(adapters)
    weight = weight / max(1, sum(2 * math.prod(a.lora_A.shape[:-2]) for a in adapters))
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


def plot_ranks(ranks: Mapping[str, int], schedule: Schedule, step: int, path: str | Path | None = None) -> Any:
    """Plot the rank of each layer as a bar; returns the matplotlib figure, and saves it to ``path`` if given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.22 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(ranks), list(ranks.values()))
    axes.axvline(schedule.target_r, color="gray", linestyle="--", label=f"target_r = {schedule.target_r}")
    axes.invert_yaxis()
    axes.set(xlabel="rank", xlim=(0, schedule.init_r), title=f"AdaLoRA: ranks after {step} steps")
    axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
