"""Checks at the moments where fine-tuning fails silently: a head left frozen, an adapter that never runs or learns.

Each raises :class:`AuditError` or warns, as the methods' ``audit`` says.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.host import hosts
from lightning_peft.core.inject import injection_of
from lightning_peft.core.sites import output_head, weight_sites
from lightning_peft.core.state import adapter_state

__all__ = ["AuditError", "CallAudit", "audit_gradients", "audit_head", "audit_optimizers", "audit_ranks", "report"]


class AuditError(RuntimeError):
    """Training would run, and not do what it seems to."""


def report(model: nn.Module, message: str) -> None:
    """Raise or warn, whichever is the strictest that a method on ``model`` asks for."""
    record = injection_of(model)
    levels = {getattr(method, "audit", "error") for method in record.methods.values()} if record else {"error"}
    if "error" in levels:
        raise AuditError(f"{message} (audit='warn' or 'off' lets it pass)")
    if "warn" in levels:
        warnings.warn(message, stacklevel=2)


def audit_head(model: nn.Module) -> None:
    """A pretrained base whose freshly initialised head is frozen cannot learn its task."""
    sites = weight_sites(model)
    head = output_head(model, sites)
    if head is None or sites[head].weight.requires_grad or hasattr(sites[head].module, "adapters"):
        return
    others = [site.weight for name, site in sites.items() if name != head and site.linear_like]
    if _looks_fresh(sites[head].weight) and others and not any(_looks_fresh(w) for w in others):
        report(
            model,
            f"the output head {head!r} is frozen, and its values look freshly initialised while the rest of the "
            f"model looks pretrained: add trainable=[{head.rpartition('.')[2]!r}]",
        )


def _looks_fresh(weight: Tensor) -> bool:
    """Whether the values are those of a common initialiser: uniform as in ``nn.Linear``, or normal with 0.02."""
    if weight.is_meta or not weight.is_floating_point() or weight.numel() < 64:
        return False
    w = weight.detach().flatten()[:65536].float()
    std, kurtosis = w.std().item(), (w**4).mean().item() / (w**2).mean().item() ** 2
    noise = 4 * math.sqrt(24 / w.numel())  # four standard errors of a normal sample's kurtosis
    bound = 1 / math.sqrt(weight[0].numel())
    uniform = w.abs().max().item() <= bound * 1.001 and abs(std / bound * math.sqrt(3) - 1) < 0.1
    return (uniform and abs(kurtosis - 1.8) < 0.3) or (abs(std / 0.02 - 1) < 0.1 and abs(kurtosis - 3) < noise)


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
            f"{_few(absent)} would never be updated: no optimizer holds them. Build the optimizer in "
            "configure_optimizers over self.parameters() or lp.trainable_parameters(self)",
        )
    if twice:
        report(model, f"{_few(twice)} are in more than one optimizer group and would be updated twice a step")


def audit_gradients(model: nn.Module, scaled: bool) -> None:
    """After the first backward every trainable parameter has a finite gradient.

    Args:
        model: the adapted model.
        scaled: gradients were scaled for half precision, where a first overflow is part of the game.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    without = [name for name, p in trainable if p.grad is None]
    if without:
        some = _some_of_each(without, [name for name, p in trainable if p.grad is not None])
        message = (
            f"{_few(without)} got no gradient in the first step: the modules were not called, or their parents read "
            "the weights without calling them"
        )
        if some:
            warnings.warn(f"{message}. Others of the same kind did, so this may be routing.", stacklevel=2)
        else:
            report(model, f"{message}; exclude them, or adapt the module that reads them")
    bad = [n for n, p in trainable if p.grad is not None and not scaled and not p.grad.isfinite().all()]
    if bad:
        report(
            model, f"{_few(bad)} got a gradient that is not finite in the first step: lower the learning rate or alpha"
        )


class CallAudit:
    """Notes which adapted modules are called during one evaluation batch.

    A parent that reads weights on a path of its own in eval mode leaves the adapters out there only; training
    looks right and evaluation is that of the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.called: set[str] = set()
        # An adapter without parameters only helps another, which is checked itself.
        running = [(name, host.adapters) for name, host in hosts(model) if host.adapters.active]  # type: ignore[union-attr]
        self.expected = [name for name, stack in running if any(True for _ in stack.parameters())]
        modules = dict(model.named_modules())
        self.handles = [modules[n].register_forward_hook(self._note(n)) for n in self.expected]

    def _note(self, name: str) -> Callable[..., None]:
        return lambda *args: self.called.add(name)

    def finish(self) -> None:
        """Take the hooks away and report the modules that were not called."""
        for handle in self.handles:
            handle.remove()
        missed = [name for name in self.expected if name not in self.called]
        if not missed:
            return
        message = f"the adapters of {_few(missed)} did not run in evaluation"
        if _some_of_each(missed, sorted(self.called)):
            warnings.warn(f"{message}. Others of the same kind did, so this may be routing.", stacklevel=2)
        else:
            report(self.model, f"{message}: a parent module computes without calling them")


def audit_ranks(model: nn.Module, strategy: Any) -> None:
    """All ranks of a distributed run hold the same adapters."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    digest = {k: (tuple(v.shape), float(v.double().sum())) for k, v in adapter_state(model).items() if not v.is_meta}
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, digest)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            keys = [k for k in {**other, **everywhere[0]} if other.get(k) != everywhere[0].get(k)]
            raise AuditError(f"rank {rank} holds other adapters than rank 0: {_few(sorted(keys))}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _some_of_each(missed: list[str], others: list[str]) -> bool:
    """Whether every missed name has a sibling among ``others`` that differs only in a number."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    return {kind(name) for name in missed} <= {kind(name) for name in others}
