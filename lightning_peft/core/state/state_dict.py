"""The trainable state: what a checkpoint holds, decided by looking and not by names.

It is every parameter that methods train, every tensor that an adapter owns, and every other value that has changed
since the methods were applied: buffers, parameters that move without gradients, extra state of modules. What trains is
remembered in the record; ``requires_grad`` may be off for a moment, and is not asked. On load, what is expected, what
is there and what is unknown are compared, and any difference is an error that names the key. Missing frozen keys are
fine: the base brings them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import check_known, stack_prefixes
from lightning_peft.core.names import canonical, join, nearest
from lightning_peft.core.record import injected_module, injected_name, injection_state
from lightning_peft.core.state.moved_values import extra_state
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
]


class StateError(RuntimeError):
    """A state that does not belong to this model, with the keys that tell."""


def trainable_keys(model: nn.Module) -> set[str]:
    """The keys of ``model.state_dict()`` that make up its trainable state, in canonical form."""
    return owned_keys(model) | moved_keys(model)


def owned_keys(model: nn.Module) -> set[str]:
    """The keys of what adapters own, and of the base parameters that train, under each name they are stored by."""
    inside = stack_prefixes(model)
    stored = nn.Module.state_dict(model, keep_vars=True)
    trained = _trained(model)
    return {canonical(key) for key, value in stored.items() if id(value) in trained or key.startswith(inside)}


def state_keys(model: nn.Module) -> set[str]:
    """:func:`trainable_keys` as they were when they were last worked out, which reads no values of the base."""
    return owned_keys(model) | _moved_before(model)


def _trained(model: nn.Module) -> set[int]:
    """The identities of the parameters that train; of a model without methods, of those that require gradients."""
    record = injection_state(model)
    if record is None:
        return {id(p) for p in model.parameters() if p.requires_grad}
    parameters = {canonical(n): p for n, p in injected_module(model).named_parameters(remove_duplicate=False)}
    return {id(parameters[name]) for name in record.trained_among(parameters)}


def moved_keys(model: nn.Module) -> set[str]:
    """The keys of other values that changed since the methods were applied, and of a trained module's extra state."""
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
    stored = {canonical(key) for key in nn.Module.state_dict(model)}
    moved = {join(prefix, name) for name in record.moved}
    return moved & stored


def fix_trained(model: nn.Module) -> None:
    """Decide that all that requires gradients now trains, and remember the values of the rest.

    For the start of a fit: what the user unfroze or froze by hand before counts as well. Values that are remembered
    already stay so, except where they were cast or sharded since.
    """
    record, root = injection_state(model), injected_module(model)
    if record is None:
        return
    inside = stack_prefixes(root)
    on = [name for name, p in root.named_parameters() if p.requires_grad]
    base = [canonical(name) for name in on if not name.startswith(inside)]
    record.also_trained |= set(base) - record.trained_among(base)
    for name, trains in record.trained_base.items():
        if any(key.startswith(stack_prefixes(root, name)) for key in on):
            record.trained_base[name] = replace(trains, adapters=True)
    record.start.keep(root, owned_keys(root))
    record.start.mark(root)


def _parameter_names(model: nn.Module) -> list[str]:
    return [canonical(name) for name, _ in model.named_parameters(remove_duplicate=False)]


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The trainable state by key: what a checkpoint holds.

    The values are tensors, except extra state that a module of the base gives in another form.

    Args:
        model: a model that methods were applied to.
        name: one adapter's tensors only; by default all that trains, heads and other moved values included.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    if name is None:
        keys = trainable_keys(model)
        return {canonical(k): v for k, v in nn.Module.state_dict(model).items() if canonical(k) in keys}
    check_known(model, name)
    inside = stack_prefixes(model, name)
    return {canonical(k): v for k, v in nn.Module.state_dict(model).items() if k.startswith(inside)}


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare a trainable state with what ``model`` expects.

    Raises:
        StateError: keys are missing, unknown, misshapen, empty or not finite.
    """
    current = {canonical(k): v for k, v in nn.Module.state_dict(model).items()}
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
            continue  # its module checks it
        if given[key].shape != current[key].shape:
            shapes = f"{tuple(given[key].shape)} in the file, {tuple(current[key].shape)} in the model"
            problems.append(f"{key}: {shapes}")
        elif key in expected and given[key].is_floating_point() and not is_finite(given[key]):
            problems.append(f"{key}: holds NaN or infinity")
    if problems:
        raise StateError("the state does not fit this model:\n  " + "\n  ".join(problems[:12]))


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check a trainable state against ``model`` and load it.

    Raises:
        StateError: see :func:`check_state`; nothing is loaded then.
    """
    check_state(model, state)
    names = {canonical(k): k for k in nn.Module.state_dict(model)}
    nn.Module.load_state_dict(model, {names[canonical(k)]: v for k, v in state.items()}, strict=False)
    moved_keys(model)  # what the state moved stays part of it, also where a cast follows


def _listed(keys: list[str], others: Iterable[str]) -> str:
    text = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    near = nearest(keys[0], list(others), n=1, cutoff=0.6)
    return f"{text} (nearest to the first: {near[0]})" if near else text
