"""The trainable state: what a checkpoint holds, decided by looking and not by names.

It is every parameter that methods train, every tensor that an adapter owns, and every other value that has changed
since the methods were applied: buffers, parameters that move without gradients, extra state of modules. What trains is
remembered in the record; ``requires_grad`` may be off for a moment, and is not asked. On load, what is expected, what
is there and what is unknown are compared, and any difference is an error that names the key. Missing frozen keys are
fine: the base brings them.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.host import check_known, stack_prefixes, stacks
from lightning_peft.core.moved import extra_state
from lightning_peft.core.names import canonical
from lightning_peft.core.record import injected_module, injected_name, injection_of
from lightning_peft.ops.finite import is_finite

__all__ = [
    "StateError",
    "adapter_state",
    "canonical",
    "check_fingerprint",
    "check_state",
    "fingerprint",
    "load_state",
    "moved_keys",
    "owned_keys",
    "settle",
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
    record = injection_of(model)
    if record is None:
        return {id(p) for p in model.parameters() if p.requires_grad}
    parameters = {canonical(n): p for n, p in injected_module(model).named_parameters(remove_duplicate=False)}
    return {id(parameters[name]) for name in record.decided(parameters)}


def moved_keys(model: nn.Module) -> set[str]:
    """The keys of other values that changed since the methods were applied, and of a trained module's extra state."""
    record, root = injection_of(model), injected_module(model)
    if record is None:
        return set()
    trained = record.decided(_parameter_names(root))
    record.moved |= record.start.moved(root, trained) | record.decided(extra_state(root))
    return _moved_before(model)


def _moved_before(model: nn.Module) -> set[str]:
    record, prefix = injection_of(model), canonical(injected_name(model))
    if record is None:
        return set()
    stored = {canonical(key) for key in nn.Module.state_dict(model)}
    moved = {f"{prefix}.{name}" if prefix else name for name in record.moved}
    return moved & stored


def settle(model: nn.Module) -> None:
    """Decide that all that requires gradients now trains, and remember the values of the rest.

    For the start of a fit: what the user unfroze or froze by hand before counts as well. Values that are remembered
    already stay so, except where they were cast or sharded since.
    """
    record, root = injection_of(model), injected_module(model)
    if record is None:
        return
    inside = stack_prefixes(root)
    on = [name for name, p in root.named_parameters() if p.requires_grad]
    base = [canonical(name) for name in on if not name.startswith(inside)]
    record.kept |= set(base) - record.decided(base)
    for name, trains in record.trains.items():
        if any(key.startswith(stack_prefixes(root, name)) for key in on):
            record.trains[name] = replace(trains, adapters=True)
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
    near = difflib.get_close_matches(keys[0], list(others), n=1, cutoff=0.6)
    return f"{text} (nearest to the first: {near[0]})" if near else text


def fingerprint(
    model: nn.Module, tensors: int = 256, samples: int = 8, leave_out: Iterable[str] = ()
) -> dict[str, Any]:
    """What identifies the frozen base: a digest of names and shapes, and a few values of some tensors.

    Values rather than a digest of them, so that a base loaded in another precision is still the same base.

    Args:
        model: the adapted model; what trains and what adapters own is left out.
        tensors: at most so many tensors are sampled, evenly over the model.
        samples: values taken from each, evenly over the tensor.
        leave_out: names of parameters that are frozen now and train later.
    """
    frozen = _tensors_but(model, trainable_keys(model) | set(leave_out) | extra_state(model).keys())
    shapes = hashlib.sha256(repr([(n, tuple(t.shape)) for n, t in sorted(frozen.items())]).encode()).hexdigest()
    names = list(frozen)
    chosen = names[:: max(1, len(names) // tensors)]
    values = {n: _sample(frozen[n], samples) for n in chosen if frozen[n].numel() and not frozen[n].is_meta}
    return {"shapes": shapes, "values": values}


def check_fingerprint(model: nn.Module, saved: Mapping[str, Any], plain: bool = False) -> None:
    """Compare the base with the one a state was trained on.

    Args:
        model: the base, adapted or not.
        saved: what :func:`fingerprint` gave for the other.
        plain: nothing was applied to ``model`` yet, so that all of it is base although it requires gradients.

    Raises:
        StateError: a tensor of the base is missing or holds other values, or adapters are merged into it.
    """
    if any(stack.merged is not None for stack in stacks(model).values()):
        raise StateError("adapters are merged into the base, so that it cannot be compared: lp.unmerge(model) first")
    trained = set() if plain else trainable_keys(model)
    frozen = _tensors_but(model, trained)
    for name, values in saved["values"].items():
        if name in trained:
            continue
        if name not in frozen:
            near = difflib.get_close_matches(name, list(frozen), n=1)
            raise StateError(
                f"this is another base model: it has no tensor {name!r}" + (f"; nearest: {near[0]!r}" if near else "")
            )
        if frozen[name].is_meta or not frozen[name].numel():
            continue
        here = torch.tensor(_sample(frozen[name], len(values)), dtype=torch.float64)
        there = torch.tensor(values, dtype=torch.float64)
        if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-2, atol=1e-6):
            raise StateError(
                f"this is another base model: the values of {name!r} differ from those the state was trained on. "
                "Load the same pretrained weights (and build anything random in the base from a fixed seed)"
            )


def _tensors_but(model: nn.Module, without: set[str]) -> dict[str, Tensor]:
    state = {canonical(k): v for k, v in nn.Module.state_dict(model).items() if isinstance(v, Tensor)}
    return {k: v for k, v in state.items() if k not in without}


def _sample(tensor: Tensor, samples: int) -> list[float]:
    if hasattr(tensor, "full_tensor"):  # sharded; all ranks come here together
        tensor = tensor.full_tensor()
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)
    steps = min(samples, flat.numel())
    # In float64: float32 counts exactly to 2^24 only, and would step past the end of a large embedding.
    index = torch.linspace(0, flat.numel() - 1, steps, dtype=torch.float64).long().to(flat.device)
    return [float(v) for v in flat[index].to("cpu", torch.float32)]
