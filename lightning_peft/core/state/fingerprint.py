"""Fingerprint the frozen base, to refuse a checkpoint or adapter that was trained on another base."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical, nearest
from lightning_peft.core.record import preparations
from lightning_peft.core.sharded_tensors import flat_part, full_shape, gather_elements, gather_full, is_sharded
from lightning_peft.core.state.moved_values import extra_state
from lightning_peft.core.state.state_dict import StateError, trained_base_keys
from lightning_peft.core.targeting.base_modules import base_state_dict
from lightning_peft.core.targeting.packed import packed_layers, plain_tensors

__all__ = ["OtherBaseError", "check_fingerprint", "fingerprint", "fingerprint_now"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class OtherBaseError(StateError):
    """The base model is not the one that a state was trained on."""


def fingerprint(
    model: nn.Module, tensors: int = 256, samples: int = 8, leave_out: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what identifies the frozen base: a digest of names and shapes, and a few values of some tensors.

    Also the number of quantised layers by class, so that an error can say that one base is quantised and the other is
    not.

    It stores values instead of a digest of them, so that a base loaded in another precision is still recognised.

    Args:
        model: the adapted model; trained parameters and adapters are left out.
        tensors: the maximum number of tensors to sample, spread evenly over the model.
        samples: the number of values to take from each, spread evenly over the tensor.
        leave_out: names of parameters that are frozen now and train later.
    """
    frozen = _tensors_but(model, trained_base_keys(model) | set(leave_out) | extra_state(model).keys())
    shapes = hashlib.sha256(repr([(n, tuple(full_shape(t))) for n, t in sorted(frozen.items())]).encode()).hexdigest()
    names = list(frozen)
    chosen = names[:: max(1, len(names) // tensors)]
    values = {n: _sample(frozen[n], samples) for n in chosen if full_shape(frozen[n]).numel() and not frozen[n].is_meta}
    return {"shapes": shapes, "values": _finite(values), "packed": _packed(model), "prepared": preparations(model)}


def check_fingerprint(model: nn.Module, saved: Mapping[str, Any], plain: bool = False) -> None:
    """Compare the base with the one that a state was trained on.

    Args:
        model: the base, with or without adapters.
        saved: the result of :func:`fingerprint` for the other base.
        plain: True if no methods were applied to ``model`` yet, so all of it is base although it requires gradients.

    Raises:
        StateError: if a tensor of the base is missing or has other values, or if adapters are merged into the base.
    """
    if any(stack.merged is not None for stack in stacks(model).values()):
        raise StateError("adapters are merged into the base, so it cannot be compared: call lp.unmerge(model) first")
    here, there = _packed(model), saved.get("packed")
    if isinstance(there, Mapping) and bool(here) != bool(there):
        raise OtherBaseError(
            f"this is a different base model: it has {_listed(here)}, but the state was trained on a base with "
            f"{_listed(there)}. {_advice(saved)}"
        )
    trained = set() if plain else trained_base_keys(model)
    frozen = _tensors_but(model, trained)
    for name, values in saved["values"].items():
        if name in trained:
            continue
        if name not in frozen:
            near = nearest(name, list(frozen), n=1)
            raise OtherBaseError(
                f"this is a different base model: it has no tensor {name!r}"
                + (f"; nearest: {near[0]!r}" if near else "")
            )
        if frozen[name].is_meta or not full_shape(frozen[name]).numel():
            continue
        if not _same(_sample(frozen[name], len(values)), values):
            raise OtherBaseError(
                f"this is a different base model: the values of {name!r} differ from those the state was trained on. "
                "Load the same pretrained weights (and initialise random parts of the base from a fixed seed)"
            )


def fingerprint_now(saved: Mapping[str, Any], tensors: Mapping[str, Any], adapted: Iterable[str]) -> dict[str, Any]:
    """Return the fingerprint of the base as it is now: weights may have been loaded after methods were applied.

    Weights under adapters are frozen. If one of them has changed, other weights were loaded, and the base is sampled
    again. If none has, ``saved`` is returned: EMA teachers and running statistics also change in training, but the
    base is the same.

    Args:
        saved: the result of :func:`fingerprint` when methods were applied.
        tensors: the current values of the base, by the same names; some may be missing.
        adapted: names of adapted weights, or of modules that carry adapters.
    """
    whole = {
        n: tensors[n] for n in saved["values"] if n in tensors and not (is_sharded(tensors[n]) or flat_part(tensors[n]))
    }
    now = {n: _sample(t, len(saved["values"][n])) for n, t in whole.items() if not t.is_meta}
    under = tuple(f"{name}." if name else "" for name in adapted)
    differ = [n for n, values in now.items() if not _same(values, saved["values"][n])]
    if not any(f"{n}.".startswith(under) and n.rpartition(".")[2] not in _STATISTICS for n in differ):
        return dict(saved)
    return {**saved, "values": {**saved["values"], **_finite(now)}}


def _finite(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """Drop samples that JSON cannot hold, such as those of masks with minus infinity."""
    return {name: sample for name, sample in values.items() if all(map(math.isfinite, sample))}


def _same(here: list[float], there: list[float]) -> bool:
    """Whether two samples come from the same tensor, which may have been cast in between."""
    a, b = torch.tensor(here, dtype=torch.float64), torch.tensor(there, dtype=torch.float64)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-6)


def _tensors_but(model: nn.Module, without: set[str]) -> dict[str, Tensor]:
    # With the parameters themselves, because FSDP1's say which part they are.
    state = {canonical(k): v for k, v in base_state_dict(model, keep_vars=True).items() if isinstance(v, Tensor)}
    return {n: t for k, v in state.items() if k not in without for n, t in plain_tensors(k, v)}


def _packed(model: nn.Module) -> dict[str, int]:
    """The number of packed layers of each class."""
    return dict(Counter(original_class(layer).__name__ for layer in packed_layers(model)))


def _advice(saved: Mapping[str, Any]) -> str:
    calls = [
        f"lp.{entry['method']}({', '.join(f'{k}={v!r}' for k, v in entry['config'].items())})"
        for entry in saved.get("prepared") or ()
    ]
    if not calls:
        return "Load the base that it was trained on"
    return f"Quantise this base in the same way first: lp.apply(model, {', '.join(calls)})"


def _listed(packed: Mapping[str, int]) -> str:
    return ", ".join(f"{count} quantised {kind}" for kind, count in packed.items()) or "no quantised layers"


def _sample(tensor: Tensor, samples: int) -> list[float]:
    if tensor.layout is not torch.strided:
        tensor = tensor.detach().to_sparse().coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(gather_full(tensor).detach().resolve_conj())
    size = full_shape(tensor).numel()
    steps = min(samples, size)
    # In float64, because float32 is exact only up to 2^24 and would step past the end of a large embedding.
    index = torch.linspace(0, size - 1, steps, dtype=torch.float64).long().to(tensor.device)
    parted = is_sharded(tensor) or flat_part(tensor) is not None
    values = gather_elements(tensor, index) if parted else tensor.detach().reshape(-1)[index]
    return [float(v) for v in values.to("cpu", torch.float32)]
