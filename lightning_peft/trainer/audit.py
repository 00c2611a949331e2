"""Checks at the moments where fine-tuning fails silently: a head left frozen, an adapter that never runs or learns.

Each raises :class:`AuditError` or warns, as the methods' ``audit`` says.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import hosts, stacks
from lightning_peft.core.adapters.reads import computing
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.class_swap import add_mixin, remove_mixin
from lightning_peft.core.names import adapter_key, canonical, host_of, is_adapter_key, is_within, listed
from lightning_peft.core.record import deferred_parameters, injection_state
from lightning_peft.core.sharded_tensors import is_sharded, local_part
from lightning_peft.core.state.state_dict import owned_keys
from lightning_peft.core.targeting.sites import output_head, weight_sites
from lightning_peft.ops.finite import is_finite
from lightning_peft.trainer.checkpoints.unsafe_hparams import unreadable
from lightning_peft.trainer.optimizers import has_gradients

__all__ = [
    "AuditError",
    "CallAudit",
    "GradientAudit",
    "UnfrozenAudit",
    "audit_active",
    "audit_head",
    "audit_hyperparameters",
    "audit_loss",
    "audit_methods",
    "audit_optimizers",
    "audit_ranks",
    "audit_scaler",
    "report",
]


class AuditError(RuntimeError):
    """Training would run, and not do what it seems to."""


def report(model: nn.Module, message: str) -> None:
    """Raise or warn, whichever is the strictest that a method on ``model`` asks for."""
    record = injection_state(model)
    levels = {getattr(method, "audit", "error") for method in record.methods.values()} if record else {"error"}
    if "error" in levels:
        raise AuditError(f"{message} (audit='warn' or 'off' lets it pass)")
    if "warn" in levels:
        warnings.warn(message, stacklevel=2)


def audit_head(model: nn.Module) -> None:
    """A pretrained base whose freshly initialised head is frozen cannot learn its task."""
    sites = weight_sites(model)
    head = output_head(model, sites)
    if (
        head is None
        or sites[head].is_computed
        or sites[head].weight.requires_grad
        or hasattr(sites[head].module, "adapters")
    ):
        return
    stored = [site for site in sites.values() if site.linear_like and not site.is_computed]
    others = [site.weight for site in stored if site.name != head]
    if _looks_fresh(sites[head].weight) and others and not any(_looks_fresh(w, any_bound=True) for w in others):
        report(
            model,
            f"the output head {head!r} is frozen, and its values look freshly initialised while the rest of the "
            f"model looks pretrained: add trainable=[{head.rpartition('.')[2]!r}]",
        )


def _looks_fresh(weight: Tensor, any_bound: bool = False) -> bool:
    """Whether the values are those of a common initialiser: uniform as in ``nn.Linear``, or normal with 0.02.

    With ``any_bound`` a uniform distribution of any width counts (Xavier, Kaiming), which no training leaves behind.
    """
    weight = local_part(weight)
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return False
    if not weight.any():
        return not any_bound  # a head of zeros has not trained; another layer of zeros tells nothing of the rest
    if weight.numel() < 64:
        return False
    w = weight.detach().flatten()[:65536].float()
    std, kurtosis = w.std().item(), (w**4).mean().item() / (w**2).mean().item() ** 2
    noise = 4 * math.sqrt(24 / w.numel())  # four standard errors of a normal sample's kurtosis
    bound = w.abs().max().item() if any_bound else 1 / math.sqrt(weight[0].numel())
    uniform = w.abs().max().item() <= bound * 1.001 and abs(std / bound * math.sqrt(3) - 1) < 0.1
    return (uniform and abs(kurtosis - 1.8) < 0.3) or (abs(std / 0.02 - 1) < 0.1 and abs(kurtosis - 3) < noise)


def audit_hyperparameters(hyperparameters: Mapping[str, Any]) -> None:
    """A module among the hyperparameters is a second copy of the base in every checkpoint, and loads unsafely only."""
    for name, value in hyperparameters.items():
        if isinstance(value, nn.Module):
            size = sum(t.numel() * t.element_size() for t in value.state_dict().values())
            warnings.warn(
                f"the hyperparameter {name!r} is a {type(value).__name__} of {size / 1e6:.3g} MB: every checkpoint "
                "holds it in full, apart from what weights_only=True reads. In __init__: "
                f"self.save_hyperparameters(ignore=[{name!r}])",
                stacklevel=2,
            )
        elif (reason := unreadable(value)) is not None:
            warnings.warn(
                f"the hyperparameter {name!r} is a {type(value).__name__}, which torch.load(weights_only=True) refuses "
                f"({reason}): checkpoints keep it apart. lp.load_from_checkpoint needs {name}=... from you, or "
                "weights_only=False",
                stacklevel=2,
            )


def audit_optimizers(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Every trainable parameter belongs in exactly one optimizer group; compared by identity."""
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
            f"{listed(absent)} would never be updated: no optimizer holds them. Build the optimizer in "
            "configure_optimizers over self.parameters() or lp.trainable_parameters(self)",
        )
    if twice:
        report(model, f"{listed(twice)} are in more than one optimizer group and would be updated twice a step")


def audit_loss(model: nn.Module, loss: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """A loss that needs no gradient depends on nothing that trains."""
    if not loss.requires_grad:
        deferred = {id(p) for p in deferred_parameters(model)}
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]} - deferred
        off = [name for name, p in model.named_parameters() if id(p) in held and not p.requires_grad]
        if off:
            raise AuditError(
                "the loss of this step depends on no parameter that requires a gradient, so nothing can be learned "
                f"from it: {listed(off)} require none at this moment (toggle_optimizer of another optimizer, or frozen "
                "by hand). Compute the loss from what the toggled optimizer trains, and skip the step of an optimizer "
                "that has nothing to train"
            )
        raise AuditError(
            "the loss depends on no trainable parameter, so nothing can be learned from it: the model ran under "
            "no_grad, the loss was detached, or gradient checkpointing with use_reentrant=True cut off its regions, "
            "whose inputs need no gradient in a frozen base. Set use_reentrant=False (in transformers: "
            "gradient_checkpointing_kwargs={'use_reentrant': False}), or let the inputs require gradients "
            "(model.enable_input_require_grads())"
        )


def audit_scaler(scaler: object, optimizer: torch.optim.Optimizer) -> None:
    """torch's GradScaler fails in the step of an optimizer without gradients, and does not say why."""
    if isinstance(scaler, torch.amp.GradScaler) and not has_gradients(optimizer):
        raise AuditError(
            f"{type(optimizer).__name__} has no gradient in this step, and the gradient scaler of precision='16-mixed' "
            "cannot step without one: the loss depends on none of its parameters. Let it depend on the adapters or "
            "trained modules in every batch (return None from training_step to skip one), or use precision='bf16-mixed'"
        )


class UnfrozenAudit:
    """Parameters that the user unfreezes during a fit are in no optimizer, unless the user puts them there."""

    def __init__(self, model: nn.Module) -> None:
        later = {id(p) for p in deferred_parameters(model)}
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and id(p) not in later}
        self.model, self.frozen = model, frozen

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Report those that require gradients by now; each once."""
        unfrozen = {name: p for name, p in self.frozen.items() if p.requires_grad}
        if not unfrozen:
            return
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self.frozen = {name: p for name, p in self.frozen.items() if name not in unfrozen}
        if idle := [name for name, p in unfrozen.items() if id(p) not in held]:
            report(
                self.model,
                f"{listed(idle)} were unfrozen during the fit and would not be updated: no optimizer holds them. Let "
                "lp.GradualUnfreezing unfreeze them, name them in trainable from the start, or give them to the "
                "optimizer (optimizer.add_param_group)",
            )


def audit_active(model: nn.Module) -> None:
    """An adapter that is to train and takes no part learns nothing, unless rows of a batch will name it."""
    idle = {
        name
        for stack in stacks(model).values()
        for name, adapter in stack.items()
        if name not in stack.active and stack.ever_routed is None and any(p.requires_grad for p in adapter.parameters())
    }
    if idle:
        warnings.warn(
            f"{sorted(idle)} are to train and are not active: they learn only where lp.set_active or lp.rows "
            "lets them take part",
            stacklevel=2,
        )


class CallAudit:
    """Notes which adapted modules are called, and which have their weights read, while one batch runs.

    Code that reads a weight gets the adapted one. An adapter that works on activations needs the module to be called:
    if the module was read and not called, a parent computes with its weights and the adapter is bypassed. A module
    that was neither is not used by this batch.

    No hooks: their presence alone changes which path some modules take.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # An adapter without parameters only helps another one, which is watched itself.
        found = [(name, host, cast(AdapterStack, host.adapters)) for name, host in hosts(model)]
        self.watched = {n: h for n, h, stack in found if stack.active and any(True for _ in stack.parameters())}
        for host in self.watched.values():
            host.__dict__["_peft_seen"] = set()
            add_mixin(host, _Watched)

    def finish(self) -> tuple[set[str], list[str]]:
        """Stop watching; the names of the modules that were called, and of those that were bypassed."""
        called, bypassed = set(), []
        for name, host in self.watched.items():
            remove_mixin(host, _Watched)
            seen = host.__dict__.pop("_peft_seen")
            if "called" in seen:
                called.add(name)
            elif seen and any(not a.changes() for a in cast(AdapterStack, host.adapters).running()):
                bypassed.append(name)
        self.watched = {}
        return called, bypassed

    def report(self, where: str) -> set[str]:
        """Stop watching, and report what was bypassed; returns the names of the modules that were called."""
        called, bypassed = self.finish()
        if bypassed:
            report(
                self.model,
                f"the adapters of {listed(bypassed)} did not run in {where}: a parent module reads their weights and "
                "computes without calling them, so their activations cannot be adapted. Exclude them, adapt the module "
                "that reads them, or use a method that changes weights, such as lp.LoRA",
            )
        return called


class _Watched(nn.Module):
    """Mixin of a module under a :class:`CallAudit`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_peft_seen"].add("called")
        return super().forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_parameters"] and computing():
            self.__dict__["_peft_seen"].add(name)
        return super().__getattr__(name)


class GradientAudit:
    """Every trainable parameter gets a finite gradient, soon.

    What is wrong for certain is an error at the first step. A parameter without a gradient whose module was not
    used in that step may be used in a later one; it is reported if it got none within ``steps`` steps.
    """

    def __init__(self, model: nn.Module, steps: int = 10) -> None:
        self.model = model
        self.waiting = {n for n, p in model.named_parameters() if p.requires_grad}
        self.steps = steps
        self.done = 0

    def step(self, called: set[str] | None, scaled: bool) -> None:
        """Look at the gradients before one optimizer step.

        Args:
            called: names of the adapted modules that ran in the first batch; None where that is not known.
            scaled: gradients were scaled for half precision, where an overflow is part of the game.
        """
        self.done += 1
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.waiting = {n for n in self.waiting if n in parameters and parameters[n].grad is None}
        if self.done == 1:
            bad = [n for n, p in parameters.items() if p.grad is not None and not scaled and not _finite(p.grad)]
            if bad:
                report(
                    self.model,
                    f"{listed(bad)} got a gradient that is not finite in the first step: lower the learning rate, or "
                    "alpha",
                )
            ran = [n for n in self.waiting if called is not None and host_of(n) in called]
            ran = [n for n in ran if _took_part(self.model, n)]
            if ran:
                self._report(
                    sorted(ran),
                    "their modules ran, but cut off from the loss (no_grad, detach, or gradient checkpointing with "
                    "use_reentrant=True, which a frozen base needs use_reentrant=False for)",
                    routing=False,
                )
        if self.done == self.steps:
            self.finish()

    def finish(self) -> None:
        """Report what got no gradient so far."""
        idle = {name for name in self.waiting if not _took_part(self.model, name)}
        if idle and self.done:
            self._report(
                sorted(idle), "their adapters are not active (lp.set_active), or no row named them", routing=False
            )
        if self.waiting and self.done:
            self._report(sorted(self.waiting), "their modules were not called")
        self.waiting = set()

    def _report(self, names: list[str], why: str, routing: bool = True) -> None:
        self.waiting -= set(names)
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad and n not in {*names, *self.waiting}]
        steps = "the first step" if self.done == 1 else f"the first {self.done} steps"
        message = f"{listed(names)} got no gradient in {steps}: {why}"
        if routing and _examples_of_each_kind(names, trained):
            warnings.warn(f"{message}. Others of the same kind did, so this may be routing.", stacklevel=2)
        else:
            report(self.model, f"{message}; exclude them, or find out why")


def _took_part(model: nn.Module, parameter: str) -> bool:
    """Whether the adapter that owns ``parameter``, if one does, runs where its host does: active, or named by rows."""
    for name, stack in stacks(model).items():
        if is_adapter_key(parameter) and host_of(parameter) == name:
            running = stack.active if stack.ever_routed is None else stack.ever_routed
            return any(is_within(parameter, adapter_key(name, adapter)) for adapter in running)
    return True


def _finite(gradient: Tensor) -> bool:
    return is_finite(local_part(gradient))


def audit_ranks(model: nn.Module) -> None:
    """All ranks of a distributed run hold the same adapters; sharded ones are left out."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own, full = owned_keys(model), {canonical(k): v for k, v in nn.Module.state_dict(model).items()}
    state = {k: full[k] for k in own if not full[k].is_meta and not is_sharded(full[k])}
    digest = {k: (tuple(v.shape), float(v.double().sum()), float(v.double().norm())) for k, v in state.items()}
    for rank, keys in _differences(digest):
        raise AuditError(f"rank {rank} holds other adapters than rank 0: {listed(keys)}")


def audit_methods(methods: Iterable[Any]) -> None:
    """All ranks of a distributed run attach the same methods and initialise them from the same seed.

    Where a module shards itself, no rank ever sees another's adapters: every one would train its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    said = {f"{type(m).__name__} {m.name!r}: {k}": v for m in methods for k, v in m.config().items()}
    said["seed_everything"] = os.environ.get("PL_GLOBAL_SEED")
    for rank, keys in _differences(said):
        raise AuditError(f"rank {rank} has other settings than rank 0: {listed(keys)}")


def _differences(mine: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, mine)
    for rank, other in enumerate(everywhere):
        keys = sorted(k for k in {**other, **everywhere[0]} if other.get(k) != everywhere[0].get(k))
        if keys:
            yield rank, keys


def _examples_of_each_kind(missed: list[str], others: list[str]) -> bool:
    """Whether every missed name has a sibling among ``others`` that differs only in a number."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    return {kind(name) for name in missed} <= {kind(name) for name in others}
