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
def merge(model: nn.Module, name: str | None = None) -> None:
    """Fold the active adapters, or the one called ``name``, into the base weights.

    Computed in float32, as in evaluation (no dropout), and rounded once to the weight's type. The originals are kept
    for :func:`unmerge`.

    Raises:
        MergeError: an adapter that is no function of a weight, one that would change places with an earlier one where
            that makes a difference, a weight that other modules share, a result that is not finite, adapters merged
            already; named before anything is changed.
        ValueError: no adapter of that name.
    """
    if name is not None and name not in adapter_names(model):
        raise ValueError(f"no adapter named {name!r}; the model has {list(adapter_names(model))}")
    owners = _owners(model)
    merged: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    for host_name, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        if stack.merged is not None:
            raise MergeError(f"{host_name!r} has adapters merged already: lp.unmerge(model) first")
        names = stack.active if name is None else tuple(n for n in stack if n == name)
        adapters = [cast(Adapter, stack[n]) for n in names]
        for adapter_name, adapter in zip(names, adapters):
            if not adapter.weights():
                raise MergeError(f"{adapter_name!r} at {host_name!r} ({type(adapter).__name__}) is no weight change")
        if name is not None and adapters:
            _check_order(host_name, stack, name)
        if adapters:
            merged.append((host, _merged_weights(host_name, host, adapters, owners)))
    for host, weights in merged:
        stack = cast(AdapterStack, host.adapters)
        stack.merged = {p: _copy(stored_parameter(host, p)) for p in weights}
        stack.merged_names = stack.active if name is None else (name,)
        for parameter, weight in weights.items():
            _set(host, parameter, weight)
        stack.refresh()


def _check_order(host_name: str, stack: AdapterStack, name: str) -> None:
    """Folded in alone, an adapter comes ahead of those that ran before it: only sums may change places."""
    order = list(stack)
    earlier = [n for n in stack.active if order.index(n) < order.index(name)]
    if not earlier:
        return
    for other in earlier:
        for part in (stack[other], stack[name]):
            kinds = [type(weight) for weight in cast(Adapter, part).weights().values()]
            if not kinds or any(kind.transform is not WeightAdapter.transform for kind in kinds):
                raise MergeError(
                    f"{name!r} at {host_name!r} runs after {other!r}, and folded in alone it would run before it, "
                    f"which is not the same for {type(part).__name__}: merge both, or let {name!r} alone be active"
                )


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
        MergeError: ``merge=True`` and an adapter cannot be folded.
    """
    from lightning_peft.core.inject import injected_name, injection_of

    if merge and not any(cast(AdapterStack, h.adapters).merged for _, h in hosts(model)):
        _merge(model)
    if not merge:
        unmerge(model)
    record, injected = injection_of(model), model.get_submodule(injected_name(model))
    for name, _ in list(hosts(model)):
        detach(model, name)
    for module in model.modules():
        restore_class(module)
        module.__dict__.pop("_peft_injection", None)
        if (dtype := module.__dict__.pop("_compute_dtype", None)) is not None:
            module.to(dtype)
        if (mode := module.__dict__.pop("_mode_asked", None)) is not None:
            module.train(mode)
    if record is not None:
        for name, parameter in injected.named_parameters():
            parameter.requires_grad_(canonical(name) in record.trained_before)
    return model
