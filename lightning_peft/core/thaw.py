"""Parameters of the base that start frozen and train later: which they are, and which train by now.

The set that has thawed is part of what a checkpoint says, so that loading one restores it, in both directions: what a
later checkpoint trains is thawed before the optimizer's state comes, and what an earlier one had not thawed yet is
frozen again at the values of the base.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lightning_peft.core.freeze import FrozenNorm, freeze_norm_statistics
from lightning_peft.core.record import Injection, injected_module, injection_of
from lightning_peft.core.swap import has_mixin, remove_mixin

__all__ = ["set_thawed", "thaw", "thawed"]


def thawed(model: nn.Module) -> list[str]:
    """The names of the parameters that started frozen and train by now."""
    record = injection_of(model)
    return [name for name, before in record.later.items() if before is not None] if record is not None else []


def thaw(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Let the parameters called ``names`` train from now on; returns those that did not already.

    Their values are copied to the CPU, for :func:`set_thawed` to go back to.
    """
    root, record = injected_module(model), injection_of(model)
    assert record is not None
    new = [name for name in names if record.later[name] is None]
    for name in new:
        parameter = root.get_parameter(name)
        record.later[name] = parameter.detach().to("cpu", copy=True)
        parameter.requires_grad_(True)
    _after(root, record)
    return new


@torch.no_grad()
def set_thawed(model: nn.Module, names: Iterable[str]) -> None:
    """Let exactly ``names`` of the later parameters train; others that did are frozen at the values they started from.

    Raises:
        KeyError: a name that is none of the model's later parameters.
    """
    record, wanted = injection_of(model), list(names)
    if record is None:
        return
    root = injected_module(model)
    for name, before in record.later.items():
        if before is not None and name not in wanted:
            parameter = root.get_parameter(name)
            parameter.copy_(before.to(parameter.device))
            parameter.requires_grad_(False)
            parameter.grad = None
            record.later[name] = None
    thaw(model, wanted)


def _after(root: nn.Module, record: Injection) -> None:
    """What follows from a change of what trains: norm statistics, and the count."""
    for module in root.modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if has_mixin(module, FrozenNorm) and trains and not module._hold_statistics:
            remove_mixin(module, FrozenNorm)
            module.train(getattr(module, "_mode_asked", root.training))
    if not any(method.train_norm_stats for method in record.methods.values()):
        freeze_norm_statistics(root)
    record.report.count(root)
