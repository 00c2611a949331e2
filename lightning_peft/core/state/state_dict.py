"""The trainable state, which is what a checkpoint holds: decided from the model itself, not from name patterns.

It consists of every parameter that methods train, every tensor of an adapter, and every other value that has changed
since methods were applied: buffers, parameters that change without gradients, extra state of modules. The record says
which parameters train; ``requires_grad`` is not used, because user code may turn it off temporarily. On load, expected
and present keys are compared, and a missing or unknown key is an error that names it. Frozen keys may be missing,
because the base has their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import check_known
from lightning_peft.core.adapters.stack import Adapted, AdapterStack
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.names import adapter_key, canonical, join, nearest
from lightning_peft.core.record import injected_module, injected_name, injection_state
from lightning_peft.core.state.moved_values import extra_state
from lightning_peft.core.targeting.base_modules import (
    base_modules,
    base_parameters,
    base_state_dict,
    local_state_dict,
    without_fsdp_hooks,
)
from lightning_peft.ops.finite import is_finite

__all__ = [
    "StateError",
    "adapter_state",
    "check_state",
    "fix_trained",
    "load_state",
    "moved_keys",
    "owned_keys",
    "state_keys",
    "trainable_keys",
    "trained_base_keys",
]


class StateError(RuntimeError):
    """A state does not fit the model; the message names the keys."""


def trainable_keys(model: nn.Module) -> set[str]:
    """Return the keys of ``model.state_dict()`` that make up its trainable state, in canonical form."""
    return owned_keys(model) | moved_keys(model)


def owned_keys(model: nn.Module) -> set[str]:
    """Return the keys of adapters and of trained base parameters; a shared parameter under each of its keys."""
    of_base, every = base_state_dict(model, keep_vars=True), local_state_dict(model)
    trained = _trained(model)
    return {canonical(key) for key in every if key not in of_base or id(of_base[key]) in trained}


def trained_base_keys(model: nn.Module) -> set[str]:
    """Return the keys of :func:`trainable_keys` that belong to the base."""
    trained = _trained(model)
    of_base = base_state_dict(model, keep_vars=True)
    return {canonical(key) for key, value in of_base.items() if id(value) in trained} | moved_keys(model)


def state_keys(model: nn.Module) -> set[str]:
    """Return :func:`trainable_keys` with the last known moved values, without reading values of the base."""
    return owned_keys(model) | _moved_before(model)


def _trained(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that train; in a model without methods, of those that require gradients."""
    record = injection_state(model)
    if record is None:
        return {id(p) for p in model.parameters() if p.requires_grad}
    parameters = {canonical(n): p for n, p in base_parameters(injected_module(model), remove_duplicate=False)}
    return {id(parameters[name]) for name in record.trained_among(parameters)}


def moved_keys(model: nn.Module) -> set[str]:
    """Return the keys of other values that changed after methods were applied, and of trained modules' extra state."""
    record, root = injection_state(model), injected_module(model)
    if record is None:
        return set()
    trained = record.trained_among(_parameter_names(root))
    record.moved |= record.start.moved(root, trained) | record.trained_among(extra_state(root))
    return _moved_before(model)


def _moved_before(model: nn.Module) -> set[str]:
    record, prefix = injection_state(model), canonical(injected_name(model))
    if record is None:
        return set()
    stored = {canonical(key) for key in base_state_dict(model)}
    moved = {join(prefix, name) for name in record.moved}
    return moved & stored


def fix_trained(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Record that every parameter that requires gradients now trains, and remember the values of the others.

    Called at the start of a fit, so that parameters that the user unfroze before are included. Values that were
    remembered earlier are kept, unless they were cast or sharded since.

    Args:
        model: an adapted model.
        names: the adapters to look at, in addition to the base; by default all.
    """
    record, root = injection_state(model), injected_module(model)
    if record is None:
        return
    base = [canonical(name) for name, p in base_parameters(root) if p.requires_grad]
    record.also_trained |= set(base) - record.trained_among(base)
    adapters: dict[str, Tensor] = {}
    for name in record.trained_base if names is None else names:
        own = _tensors_of(root, name)
        adapters |= own
        if any(value.requires_grad for value in own.values()):
            record.trained_base[name] = replace(record.trained_base[name], adapters=True)
    trained = _trained(root)
    of_base = {canonical(k): v for k, v in base_state_dict(root, keep_vars=True).items() if isinstance(v, Tensor)}
    record.start.keep(of_base, {k for k, v in of_base.items() if id(v) in trained}, adapters)
    record.start.mark(root)


def _tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of the adapter ``name`` by canonical key, as ``state_dict`` stores them."""
    found: dict[str, Tensor] = {}
    for prefix, module in base_modules(model, remove_duplicate=False):
        if has_mixin(module, Adapted) and name in (stack := cast(AdapterStack, module._modules["adapters"]))._modules:
            stored = stack[name].state_dict(prefix=f"{adapter_key(prefix, name)}.", keep_vars=True)
            found |= {canonical(key): value for key, value in stored.items()}
    return found


def _parameter_names(model: nn.Module) -> list[str]:
    return [canonical(name) for name, _ in base_parameters(model, remove_duplicate=False)]


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the trainable state by key, which is what a checkpoint holds.

    The values are tensors, except extra state that a module of the base returns in another form.

    Args:
        model: a model that methods were applied to.
        name: return only the tensors of this adapter. By default, everything that trains or has changed, including
            heads.

    Raises:
        ValueError: if the model does not have an adapter of that name.
    """
    if name is None:
        keys = trainable_keys(model)
        return {canonical(k): v for k, v in local_state_dict(model).items() if canonical(k) in keys}
    check_known(model, name)
    return {key: value.detach() for key, value in _tensors_of(model, name).items()}


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that a trainable state fits ``model``.

    Raises:
        StateError: if keys are missing or unknown, or values have the wrong shape or are not finite.
    """
    current = {canonical(k): v for k, v in local_state_dict(model).items()}
    given = {canonical(k): v for k, v in state.items()}
    expected, extra = owned_keys(model), extra_state(model)
    problems = []
    missing, unknown = sorted(expected - given.keys()), sorted(given.keys() - current.keys())
    if missing:
        problems.append(f"missing: {_listed(missing, unknown)}")
    if unknown:
        problems.append(f"unknown to this model: {_listed(unknown, missing or current)}")
    for key in sorted(given.keys() & current.keys()):
        if key in extra:
            continue  # set_extra_state of its module checks it
        if given[key].shape != current[key].shape:
            shapes = f"{tuple(given[key].shape)} in the file, {tuple(current[key].shape)} in the model"
            problems.append(f"{key}: {shapes}")
        elif key in expected and given[key].is_floating_point() and not is_finite(given[key]):
            problems.append(f"{key}: holds NaN or infinity")
    if problems:
        raise StateError("the state does not fit this model:\n  " + "\n  ".join(problems[:12]))


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that a trainable state fits ``model``, and load it.

    Raises:
        StateError: if :func:`check_state` raises it; nothing is loaded in this case.
    """
    check_state(model, state)
    names = {canonical(k): k for k in local_state_dict(model)}
    with without_fsdp_hooks(model):
        nn.Module.load_state_dict(model, {names[canonical(k)]: v for k, v in state.items()}, strict=False)
    moved_keys(model)  # remember now what the state changed: after a cast it could not be detected any more


def _listed(keys: list[str], others: Iterable[str]) -> str:
    text = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    near = nearest(keys[0], list(others), n=1, cutoff=0.6)
    return f"{text} (nearest to the first: {near[0]})" if near else text
