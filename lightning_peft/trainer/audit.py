"""Checks for mistakes that would otherwise fail silently: a frozen head, or an adapter that never runs or learns.

Each raises :class:`AuditError` or warns, depending on the methods' ``audit`` argument.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.names import adapter_key, host_of, is_adapter_key, is_within, listed
from lightning_peft.core.record import deferred_parameters, injection_state
from lightning_peft.core.sharded_tensors import local_part
from lightning_peft.core.targeting.sites import output_head, weight_sites
from lightning_peft.ops.finite import is_finite
from lightning_peft.trainer.checkpoints.unsafe_hparams import unreadable
from lightning_peft.trainer.optimizers import has_gradients

__all__ = [
    "AuditError",
    "GradientAudit",
    "UnfrozenAudit",
    "audit_active",
    "audit_head",
    "audit_hyperparameters",
    "audit_loss",
    "audit_optimizers",
    "audit_scaler",
    "report",
]


class AuditError(RuntimeError):
    """Raised if training would run without an error, but would not train what the user expects."""


def report(model: nn.Module, message: str) -> None:
    """Raise or warn with ``message``; the strictest ``audit`` argument among the methods on ``model`` decides.

    Raises:
        AuditError: if a method has ``audit="error"``, or if no method is attached.
    """
    record = injection_state(model)
    levels = {getattr(method, "audit", "error") for method in record.methods.values()} if record else {"error"}
    if "error" in levels:
        raise AuditError(f"{message} (to continue anyway, set audit='warn' or 'off')")
    if "warn" in levels:
        warnings.warn(message, stacklevel=2)


def audit_head(model: nn.Module) -> None:
    """Report a frozen output head that looks freshly initialised on a base that looks pretrained: it cannot learn."""
    sites = weight_sites(model)
    head = output_head(model, sites)
    if (
        head is None
        or sites[head].is_computed
        or sites[head].is_packed
        or sites[head].weight.requires_grad
        or hasattr(sites[head].module, "adapters")
    ):
        return
    stored = [site for site in sites.values() if site.linear_like and not (site.is_computed or site.is_packed)]
    others = [site.weight for site in stored if site.name != head]
    if _looks_fresh(sites[head].weight) and others and not any(_looks_fresh(w, any_bound=True) for w in others):
        report(
            model,
            f"the output head {head!r} is frozen, but its values look freshly initialised while the rest of the model "
            f"looks pretrained, so it would stay random: add trainable=[{head.rpartition('.')[2]!r}]",
        )


def _looks_fresh(weight: Tensor, any_bound: bool = False) -> bool:
    """Whether the values look like a common initialisation: uniform as in ``nn.Linear``, or normal with std 0.02.

    With ``any_bound``, a uniform distribution of any width counts (Xavier, Kaiming); trained weights are never uniform.
    """
    weight = local_part(weight)
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return False
    if not weight.any():
        return not any_bound  # a head of zeros is untrained; other layers of zeros are common in trained models too
    if weight.numel() < 64:
        return False
    w = weight.detach().flatten()[:65536].float()
    std, kurtosis = w.std().item(), (w**4).mean().item() / (w**2).mean().item() ** 2
    noise = 4 * math.sqrt(24 / w.numel())  # four standard errors of a normal sample's kurtosis
    bound = w.abs().max().item() if any_bound else 1 / math.sqrt(weight[0].numel())
    uniform = w.abs().max().item() <= bound * 1.001 and abs(std / bound * math.sqrt(3) - 1) < 0.1
    return (uniform and abs(kurtosis - 1.8) < 0.3) or (abs(std / 0.02 - 1) < 0.1 and abs(kurtosis - 3) < noise)


def audit_hyperparameters(hyperparameters: Mapping[str, Any]) -> None:
    """Warn about hyperparameters that are modules or other objects, which make checkpoints large or hard to load."""
    for name, value in hyperparameters.items():
        if isinstance(value, nn.Module):
            size = sum(t.numel() * t.element_size() for t in value.state_dict().values())
            warnings.warn(
                f"the hyperparameter {name!r} is a {type(value).__name__} of {size / 1e6:.3g} MB: every checkpoint "
                "holds a full copy of it, which weights_only=True does not read. In __init__, call "
                f"self.save_hyperparameters(ignore=[{name!r}])",
                stacklevel=2,
            )
        elif (reason := unreadable(value)) is not None:
            warnings.warn(
                f"the hyperparameter {name!r} is a {type(value).__name__}, which torch.load(weights_only=True) refuses "
                f"({reason}): checkpoints store it separately. Pass {name}=... to lp.load_from_checkpoint, or "
                "weights_only=False",
                stacklevel=2,
            )


def audit_optimizers(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Report trainable parameters that are not in exactly one optimizer group; parameters are compared by identity."""
    seen: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    absent = [name for name, p in trainable if id(p) not in seen]
    twice = [name for name, p in trainable if seen.get(id(p), 0) > 1]
    if absent:
        report(
            model,
            f"{listed(absent)} would never be updated, because no optimizer holds them. Build the optimizer in "
            "configure_optimizers over self.parameters() or lp.trainable_parameters(self)",
        )
    if twice:
        report(
            model,
            f"{listed(twice)} are in more than one optimizer group, so each step would update them twice: remove them "
            "from all groups but one",
        )


def audit_loss(model: nn.Module, loss: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Refuse a loss that does not require a gradient, because nothing can be learned from it.

    Raises:
        AuditError: if the loss does not require a gradient; the message names probable causes.
    """
    if not loss.requires_grad:
        deferred = {id(p) for p in deferred_parameters(model)}
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]} - deferred
        off = [name for name, p in model.named_parameters() if id(p) in held and not p.requires_grad]
        if off:
            raise AuditError(
                "the loss of this step does not depend on any parameter that requires a gradient, so nothing can be "
                f"learned from it: {listed(off)} do not require gradients now (another optimizer is toggled, or they "
                "were frozen by hand). Compute the loss from parameters of the toggled optimizer, and skip the step of "
                "an optimizer that has nothing to train"
            )
        raise AuditError(
            "the loss does not depend on any trainable parameter, so nothing can be learned from it: the model ran "
            "under no_grad, the loss was detached, or gradient checkpointing with use_reentrant=True dropped the "
            "gradients, because inputs do not require gradients in a frozen base. Set use_reentrant=False (in "
            "transformers: gradient_checkpointing_kwargs={'use_reentrant': False}), or make the inputs require "
            "gradients (model.enable_input_require_grads())"
        )


def audit_scaler(scaler: object, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that would fail in torch's GradScaler, whose own error does not name the cause.

    Raises:
        AuditError: if ``scaler`` is a GradScaler and ``optimizer`` has no gradients.
    """
    if isinstance(scaler, torch.amp.GradScaler) and not has_gradients(optimizer):
        raise AuditError(
            f"{type(optimizer).__name__} has no gradient in this step, and the gradient scaler of precision='16-mixed' "
            "cannot step without one: the loss does not depend on its parameters. Make the loss depend on adapters or "
            "trained modules in every batch, return None from training_step to skip it, or use precision='bf16-mixed'"
        )


class UnfrozenAudit:
    """Reports parameters that the user unfreezes during a fit without adding them to an optimizer."""

    def __init__(self, model: nn.Module) -> None:
        later = {id(p) for p in deferred_parameters(model)}
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and id(p) not in later}
        self.model, self.frozen = model, frozen

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Report parameters that were unfrozen since the fit started and that no optimizer holds, each once."""
        unfrozen = {name: p for name, p in self.frozen.items() if p.requires_grad}
        if not unfrozen:
            return
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self.frozen = {name: p for name, p in self.frozen.items() if name not in unfrozen}
        if idle := [name for name, p in unfrozen.items() if id(p) not in held]:
            report(
                self.model,
                f"{listed(idle)} were unfrozen during the fit but would not be updated, because no optimizer holds "
                "them. Unfreeze them with lp.GradualUnfreezing, name them in trainable from the start, or add them to "
                "an optimizer (optimizer.add_param_group)",
            )


def audit_active(model: nn.Module) -> None:
    """Warn about trainable adapters that would not learn, because they are inactive and lp.rows has not used them."""
    idle = {
        name
        for stack in stacks(model).values()
        for name, adapter in stack.items()
        if name not in stack.active and stack.ever_routed is None and any(p.requires_grad for p in adapter.parameters())
    }
    if idle:
        warnings.warn(
            f"{sorted(idle)} are trainable but inactive, so they do not learn: activate them with lp.set_active or "
            "lp.rows",
            stacklevel=2,
        )


class GradientAudit:
    """Checks that every trainable parameter gets a finite gradient within the first ``steps`` steps.

    Certain mistakes are reported at the first step. If a parameter has no gradient because its module was not used in
    that step (a mixture of experts, for example), a later step may use it. It is reported after ``steps`` steps.
    """

    def __init__(self, model: nn.Module, steps: int = 10) -> None:
        self.model = model
        self.waiting = {n for n, p in model.named_parameters() if p.requires_grad}
        self.steps = steps
        self.done = 0

    def step(self, called: set[str] | None, scaled: bool) -> None:
        """Check the gradients before one optimizer step.

        Args:
            called: The names of the adapted modules that ran in the first batch; None if they are not known.
            scaled: Whether gradients are scaled for half precision; overflows are then normal in the first steps.
        """
        self.done += 1
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.waiting = {n for n in self.waiting if n in parameters and parameters[n].grad is None}
        if self.done == 1:
            bad = [n for n, p in parameters.items() if p.grad is not None and not scaled and not _finite(p.grad)]
            if bad:
                report(
                    self.model,
                    f"{listed(bad)} got a gradient that is not finite in the first step, so training would produce "
                    "NaN: lower alpha, or check the inputs and the loss",
                )
            ran = [n for n in self.waiting if called is not None and host_of(n) in called]
            ran = [n for n in ran if _took_part(self.model, n)]
            if ran:
                self._report(
                    sorted(ran),
                    "their modules ran, but the loss does not depend on them: it ignores their output, or no_grad, "
                    "detach or gradient checkpointing with use_reentrant=True cuts it off (a frozen base needs "
                    "use_reentrant=False)",
                    routing=False,
                )
        if self.done == self.steps:
            self.finish()

    def finish(self) -> None:
        """Report the parameters that have not had a gradient so far."""
        idle = {name for name in self.waiting if not _took_part(self.model, name)}
        if idle and self.done:
            self._report(
                sorted(idle),
                "their adapters are not active (lp.set_active), or lp.rows never named them",
                routing=False,
            )
        if self.waiting and self.done:
            self._report(
                sorted(self.waiting),
                "their modules were not called, the loss ignores their output, or gradient checkpointing with "
                "use_reentrant=True cuts it off (a frozen base needs use_reentrant=False)",
            )
        self.waiting = set()

    def _report(self, names: list[str], why: str, routing: bool = True) -> None:
        self.waiting -= set(names)
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad and n not in {*names, *self.waiting}]
        steps = "the first step" if self.done == 1 else f"the first {self.done} steps"
        message = f"{listed(names)} got no gradient in {steps}: {why}"
        if routing and _examples_of_each_kind(names, trained):
            warnings.warn(
                f"{message}. Parameters of the same kind did, so this may be the routing of experts.", stacklevel=2
            )
        else:
            report(self.model, f"{message}. Exclude them from targets, or make the loss depend on them")


def _took_part(model: nn.Module, parameter: str) -> bool:
    """Whether the adapter that owns ``parameter`` is active or was named by lp.rows; True if no adapter owns it."""
    for name, stack in stacks(model).items():
        if is_adapter_key(parameter) and host_of(parameter) == name:
            running = stack.active if stack.ever_routed is None else stack.ever_routed
            return any(is_within(parameter, adapter_key(name, adapter)) for adapter in running)
    return True


def _finite(gradient: Tensor) -> bool:
    return is_finite(local_part(gradient))


def _examples_of_each_kind(missed: list[str], others: list[str]) -> bool:
    """Whether every missed name has a sibling among ``others`` that differs only in a number."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    return {kind(name) for name in missed} <= {kind(name) for name in others}
