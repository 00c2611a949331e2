"""The trainable state: what a checkpoint holds, decided by looking and not by names.

It is every parameter that requires a gradient, every tensor that an adapter owns, and every buffer that has moved
since the methods were applied. On load, what is expected, what is there and what is unknown are compared, and any
difference is an error that names the key. Missing frozen keys are fine: the base brings them.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.host import check_known, stack_prefixes, stacks
from lightning_peft.core.record import injected_name, injection_of
from lightning_peft.ops.finite import is_finite

__all__ = [
    "StateError",
    "adapter_state",
    "canonical",
    "check_fingerprint",
    "check_state",
    "fingerprint",
    "load_state",
    "trainable_keys",
]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class StateError(RuntimeError):
    """A state that does not belong to this model, with the keys that tell."""


def canonical(key: str) -> str:
    """``key`` without the parts that ``torch.compile`` and wrappers put into names."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def trainable_keys(model: nn.Module) -> set[str]:
    """The keys of ``model.state_dict()`` that make up its trainable state, in canonical form."""
    return _owned_keys(model) | _moved_buffers(model)


def _owned_keys(model: nn.Module) -> set[str]:
    """Trainable parameters, under each name they are stored by, and all that adapters own."""
    inside = stack_prefixes(model)
    state = model.state_dict(keep_vars=True)
    return {
        canonical(key)
        for key, value in state.items()
        if getattr(value, "requires_grad", False) or key.startswith(inside)
    }


def _moved_buffers(model: nn.Module) -> set[str]:
    record, root = injection_of(model), canonical(injected_name(model))
    before = {} if record is None else {f"{root}.{name}" if root else name: b for name, b in record.buffers.items()}
    buffers = {canonical(name): buffer for name, buffer in model.named_buffers()}
    return {n for n, b in buffers.items() if n in before and not torch.equal(before[n].to(b), b)}


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The trainable state by key: what a checkpoint holds.

    Args:
        model: a model that methods were applied to.
        name: one adapter's tensors only; by default all that trains, heads and moved buffers included.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    if name is None:
        keys = trainable_keys(model)
        return {canonical(k): v for k, v in model.state_dict().items() if canonical(k) in keys}
    check_known(model, name)
    inside = stack_prefixes(model, name)
    return {canonical(k): v for k, v in model.state_dict().items() if k.startswith(inside)}


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare a trainable state with what ``model`` expects.

    Raises:
        StateError: keys are missing, unknown, misshapen, empty or not finite.
    """
    current = {canonical(k): v for k, v in model.state_dict().items()}
    given = {canonical(k): v for k, v in state.items()}
    expected = _owned_keys(model)
    problems = []
    missing, unknown = sorted(expected - given.keys()), sorted(given.keys() - current.keys())
    if missing:
        problems.append(f"missing: {_listed(missing, unknown)}")
    if unknown:
        problems.append(f"unknown to this model: {_listed(unknown, missing or current)}")
    for key in sorted(given.keys() & current.keys()):
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
    names = {canonical(k): k for k in model.state_dict()}
    nn.Module.load_state_dict(model, {names[canonical(k)]: v for k, v in state.items()}, strict=False)


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
    frozen = _tensors_but(model, _owned_keys(model) | _moved_buffers(model) | set(leave_out))
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
    trained = set() if plain else _owned_keys(model) | _moved_buffers(model)
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
    state = {canonical(k): v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return {k: v for k, v in state.items() if k not in without}


def _sample(tensor: Tensor, samples: int) -> list[float]:
    if hasattr(tensor, "full_tensor"):  # sharded; all ranks come here together
        tensor = tensor.full_tensor()
    flat = tensor.detach().reshape(-1)
    steps = min(samples, flat.numel())
    # In float64: float32 counts exactly to 2^24 only, and would step past the end of a large embedding.
    index = torch.linspace(0, flat.numel() - 1, steps, dtype=torch.float64).long().to(flat.device)
    return [float(v) for v in flat[index].to("cpu", torch.float32)]
