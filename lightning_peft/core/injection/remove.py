"""Remove one adapter from a model."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import nn

from lightning_peft.core.adapters.lookup import check_known, stacks
from lightning_peft.core.injection.attach import check_detachable, detach
from lightning_peft.core.injection.unload import unload
from lightning_peft.core.names import canonical
from lightning_peft.core.record import TrainedBase, injected_module, injection_state
from lightning_peft.core.targeting.base_modules import base_parameters

__all__ = ["check_deletable", "delete_adapter", "uninstall"]


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name`` from ``model``; other adapters are unchanged.

    A module without adapters gets its original class back. Deleting the last method restores the plain model, as
    :func:`lightning_peft.unload` does. Base parameters that the method trained (a head, biases) keep their values and
    continue to train, because their earlier values are not stored.

    Args:
        model: the adapted model; changed in place.
        name: the adapter's name.

    Raises:
        ValueError: if there is no adapter of that name, it is merged into the base, or it is in training (the
            optimizer would keep updating parameters that are no longer in the model).
    """
    check_deletable(model, name)
    uninstall(model, name)
    record = injection_state(model)
    if record is not None and not record.methods:
        unload(model)


def check_deletable(model: nn.Module, name: str) -> None:
    """Raise the errors that :func:`delete_adapter` would raise, without changing anything."""
    check_known(model, name)
    check_detachable(model)
    found = [stack for stack in stacks(model).values() if name in stack]
    if any(name in stack.merged_names for stack in found):
        raise ValueError(f"{name!r} is merged into the base: call lp.unmerge(model) first")
    trains = any(p.requires_grad for stack in found for p in cast(nn.Module, stack[name]).parameters())
    if trains and (_fitting(model) or _fitting(injected_module(model))):
        raise ValueError(f"{name!r} is in training, and the optimizer holds its parameters: delete it after the fit")


def uninstall(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name`` from the modules and from the record; nothing else changes."""
    for host_name in [host_name for host_name, stack in stacks(model).items() if name in stack]:
        detach(model, host_name, name)
    record = injection_state(model)
    if record is not None:
        record.methods.pop(name, None)
        own = record.trained_base.pop(name, TrainedBase())
        names = [canonical(n) for n, _ in base_parameters(injected_module(model), remove_duplicate=False)]
        record.also_trained |= replace(record, trained_base={name: own}).trained_among(
            names
        )  # base parameters that it trained continue to train
        record.remove_adapter(name)
        record.origins.pop(name, None)
        record.report.entries = [entry for entry in record.report.entries if entry.adapter != name]
        record.report.count(injected_module(model), record.sizes.values())


def _fitting(module: nn.Module) -> bool:
    state = getattr(getattr(module, "_trainer", None), "state", None)
    return state is not None and state.fn == "fit" and state.status == "running"
