"""Fold adapters into the base weights, and out again bit for bit."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lightning_peft.core.adapter import Adapter, WeightAdapter
from lightning_peft.core.host import AdapterStack, adapter_names, detach, effective_weights, hosts, stored_parameter
from lightning_peft.core.state import canonical
from lightning_peft.core.swap import restore_class

__all__ = ["MergeError", "merge", "unload", "unmerge"]


class MergeError(ValueError):
    """Adapters that cannot be folded into the base, and why. Nothing was changed."""


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None, partial: bool = False) -> list[str]:
    """Fold the active adapters, or the one called ``name``, into the base weights.

    Computed in float32, as in evaluation (no dropout), and rounded once to the weight's type. The originals are kept
    for :func:`unmerge`.

    Args:
        model: the adapted model; changed in place.
        name: one adapter; by default all that are active.
        partial: fold what can be folded, and let the rest run beside it as before, instead of refusing.

    Returns:
        What was left to run beside the weights, each with its place and the reason; empty unless ``partial``.

    Raises:
        MergeError: an adapter that is no function of a weight, one that would change places with an earlier one where
            that makes a difference, a weight that other modules share, a result that is not finite, adapters merged
            already; all are named before anything is changed. With ``partial``, if nothing can be folded.
        ValueError: no adapter of that name.
    """
    if name is not None and name not in adapter_names(model):
        raise ValueError(f"no adapter named {name!r}; the model has {list(adapter_names(model))}")
    owners = _owners(model)
    merged: list[tuple[nn.Module, tuple[str, ...], dict[str, torch.Tensor]]] = []
    left: dict[str, list[str]] = {}  # why, by adapter
    for host_name, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        if stack.merged is not None:
            raise MergeError(f"{host_name!r} has adapters merged already: lp.unmerge(model) first")
        names, reasons = _split(host_name, stack, name)
        try:
            if names:
                adapters = [cast(Adapter, stack[n]) for n in names]
                merged.append((host, names, _merged_weights(host_name, host, adapters, owners)))
        except MergeError as error:
            reasons |= {n: str(error) for n in names}
        for n, reason in reasons.items():
            left.setdefault(n, []).append(reason)
    if left and not (partial and merged):
        also = " (lp.merge(model, partial=True) folds all else)" if merged else ""
        raise MergeError(f"{'; '.join(_named(left))}{also}")
    for host, names, weights in merged:
        stack = cast(AdapterStack, host.adapters)
        stack.merged = {p: _copy(stored_parameter(host, p)) for p in weights}
        stack.merged_names = names
        for parameter, weight in weights.items():
            _set(host, parameter, weight)
        stack.refresh()
    return _named(left)


def _split(host_name: str, stack: AdapterStack, name: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names at one host that can be folded, in order, and why each of the others cannot."""
    names: tuple[str, ...] = ()
    reasons: dict[str, str] = {}
    for n in stack.active if name is None else [n for n in stack if n == name]:
        adapter = cast(Adapter, stack[n])
        where = f"{n!r} at {host_name!r} ({type(adapter).__name__})"
        if adapter.transparent:
            continue
        if not adapter.weights():
            reasons[n] = f"{where} is no weight change"
        elif reasons:
            reasons[n] = f"{where} runs after {next(iter(reasons))!r}, and folded in it would run before it"
        elif name is not None and (reason := _moved(host_name, stack, name)):
            reasons[n] = reason
        else:
            names += (n,)
    return names, reasons


def _named(left: dict[str, list[str]]) -> list[str]:
    """One sentence for each adapter, whatever the number of its places."""
    return [r[0] + (f", and so at {len(r) - 1} more places" if len(r) > 1 else "") for r in left.values()]


def _moved(host_name: str, stack: AdapterStack, name: str) -> str | None:
    """Folded in alone, an adapter comes ahead of those that ran before it: why it may not, unless both are sums."""
    order = list(stack)
    earlier = [n for n in stack.active if order.index(n) < order.index(name)]
    for other in earlier:
        if cast(Adapter, stack[other]).transparent:
            continue
        for part in (stack[other], stack[name]):
            kinds = [type(weight) for weight in cast(Adapter, part).weights().values()]
            if not kinds or any(kind.transform is not WeightAdapter.transform for kind in kinds):
                return (
                    f"{name!r} at {host_name!r} runs after {other!r}, and folded in alone it would run before it, "
                    f"which is not the same for {type(part).__name__}: merge both, or let {name!r} alone be active"
                )
    return None


def _merged_weights(
    host_name: str, host: nn.Module, adapters: list[Adapter], owners: dict[int, list[str]]
) -> dict[str, torch.Tensor]:
    for parameter in dict.fromkeys(p for adapter in adapters for p in adapter.weights()):
        stored = host.get_parameter(parameter)
        full = f"{host_name}.{parameter}" if host_name else parameter
        if not stored.is_floating_point():
            raise MergeError(f"{full} is stored as {stored.dtype}: a quantised weight cannot take an exact change")
        if len(owners[id(stored)]) > 1:
            others = [n for n in owners[id(stored)] if n != full]
            raise MergeError(f"{full} is the same tensor as {others}, which would change with it: untie them first")
    wide = any(host.get_parameter(p).dtype == torch.float64 for a in adapters for p in a.weights())
    modes = [(module, module.training) for adapter in adapters for module in adapter.modules()]
    try:
        for adapter in adapters:
            adapter.eval()
        weights = effective_weights(host, adapters, torch.float64 if wide else torch.float32)
    finally:
        for module, mode in modes:
            module.training = mode
    for parameter, weight in weights.items():
        if not weight.isfinite().all() or not weight.to(_dtype(host)).isfinite().all():
            raise MergeError(f"{host_name}.{parameter} would hold NaN or infinity after the merge")
    return weights


def _dtype(host: nn.Module) -> torch.dtype:
    return next(p.dtype for p in host.parameters(recurse=False))


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _set(host: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Write a parameter in place; one that was None comes to be, or goes again."""
    owner, _, last = name.rpartition(".")
    parameters = host.get_submodule(owner)._parameters
    current = parameters[last]
    if current is not None and value is not None:
        current.copy_(value)
    elif value is None:
        parameters[last] = None
    else:
        parameters[last] = nn.Parameter(value.to(_dtype(host)), requires_grad=False)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


_merge = merge  # ``unload`` has an argument of the same name


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the weights that :func:`merge` replaced, bit for bit; the adapters run beside them again."""
    for _, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        for parameter, weight in (stack.merged or {}).items():
            _set(host, parameter, weight)
        stack.merged, stack.merged_names = None, ()
        stack.refresh()


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Give the plain model back: original classes, original keys, gradients required where they were before.

    Args:
        model: the adapted model; changed in place and returned.
        merge: fold the active adapters into the weights first; otherwise the base is as it was.

    Raises:
        MergeError: ``merge=True`` and an active adapter cannot be folded, or was left out of an earlier merge.
    """
    from lightning_peft.core.inject import injected_name, injection_of

    stacks = {name: cast(AdapterStack, host.adapters) for name, host in hosts(model)}
    if merge and not any(stack.merged for stack in stacks.values()):
        _merge(model)
    elif merge:
        beside = {
            n for stack in stacks.values() for n, a in stack.items() if a in stack.running() and not a.transparent
        }
        if beside:
            raise MergeError(
                f"{sorted(beside)} are not merged but run beside the weights, and would be lost: lp.unmerge(model), "
                "lp.set_active(model, ...) what is to stay, then unload again"
            )
    if not merge:
        unmerge(model)
    record, injected = injection_of(model), model.get_submodule(injected_name(model))
    for name, _ in list(hosts(model)):
        detach(model, name)
    for module in model.modules():
        restore_class(module)
        module.__dict__.pop("_peft_injection", None)
        module.__dict__.pop("_hold_statistics", None)
        if (dtype := module.__dict__.pop("_compute_dtype", None)) is not None:
            module.to(dtype)
        if (mode := module.__dict__.pop("_mode_asked", None)) is not None:
            module.train(mode)
    if record is not None:
        for name, parameter in injected.named_parameters():
            parameter.requires_grad_(canonical(name) in record.trained_before)
    return model
