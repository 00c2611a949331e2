"""Scale the effect of an adapter after training, between its base (0) and itself (1) or beyond.

An adapter declares which of its tensors carry its effect, and their neutral values, at which it has none: zero for B of
LoRA, one for the factors of IA3. Scaling by f replaces each such tensor v by neutral + f (v - neutral). For methods
whose update is linear in these tensors (LoRA, LoHa, IA3, SSF, bottlenecks, ...) this multiplies the update by f. For
DoRA and OFT it is a path of adapters of the same kind from the base to the trained one. Because the tensors themselves
change, a scaled adapter is saved, loaded, merged and exported like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import adapter_names, check_known, check_unmerged, hosts
from lightning_peft.core.injection.overrides import ParameterOverride
from lightning_peft.core.record import injection_state

__all__ = ["Scaled", "scale"]


class _Tensor(NamedTuple):
    """A tensor that carries the effect of an adapter."""

    owner: Adapter
    name: str
    value: Tensor
    neutral: Tensor | float

    def at(self, original: Tensor, factor: float) -> Tensor:
        """The value for a factor; the original itself for 1."""
        if factor == 1:
            return original
        neutral = self.neutral
        if isinstance(neutral, Tensor):
            neutral = neutral.to(original)
        return neutral + factor * (original - neutral)


class Scaled:
    """The result of :func:`scale`; as a context manager, it restores the earlier factor at the end."""

    def __init__(self, model: nn.Module, name: str, before: float) -> None:
        self._model, self._name, self._before = model, name, before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        scale(self._model, self._name, self._before)


@torch.no_grad()
def scale(model: nn.Module, name: str, factor: float) -> Scaled:
    """Scale the effect of an adapter: 0 computes what the base computes, 1 is the adapter as it was trained.

    Factors between 0 and 1 give up some of what was learned to keep more of the base; factors below 0 or above 1
    extrapolate. The factor always refers to the adapter as trained or loaded, so ``scale(model, name, 1.0)`` restores
    it bit for bit. Saved files, checkpoints and merged weights contain the scaled adapter; when it is loaded, its
    factor is 1. If the adapter changes while it is scaled (training, loading), the factor refers to its new values from
    then on.

    Modules that train in full in addition to adapters (a head) are not scaled.

    Args:
        model: the adapted model; its adapter is changed in place.
        name: the adapter.
        factor: a finite number.

    Returns:
        A context manager: ``with lp.scale(model, name, 0.7): ...`` restores the previous factor at the end. Without
        ``with``, the factor stays.

    Raises:
        ValueError: if there is no adapter of that name, it is merged, ``factor`` is not finite, or a part of it cannot
            be scaled: prefixes and prompts, methods that train the base in place, adapters of classes that do not
            declare ``neutral``. The model is unchanged.

    Example::

        with lp.scale(model, "default", 0.7):
            trainer.validate(module, datamodule)
        lp.scale(model, "default", 0.5)
        lp.save_adapter(model, "adapters/half")
    """
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        raise ValueError(f"factor must be a finite number, got {factor!r}")
    record = injection_state(model)
    if record is not None and name in record.methods and name not in adapter_names(model):
        raise ValueError(
            f"{name!r} ({type(record.methods[name]).__name__}) trains parameters of the base in place, and their "
            "earlier values are not stored, so it cannot be scaled. Save it with lp.save_adapter and load it into the "
            "base with lp.load_adapter, which keeps both"
        )
    check_known(model, name)
    check_unmerged(model)
    tensors = list(_tensors(model, name))
    before = 1.0
    for tensor in tensors:
        factor_now, original = _original(tensor)
        before = factor_now
        tensor.value.copy_(tensor.at(original, factor))
        kept = tensor.owner.__dict__.setdefault("_unscaled", {})
        if factor == 1:
            kept.pop(tensor.name, None)
        else:
            kept[tensor.name] = factor, original
    return Scaled(model, name, before)


def _original(tensor: _Tensor) -> tuple[float, Tensor]:
    """The current factor, and the value at factor 1."""
    factor, original = tensor.owner.__dict__.get("_unscaled", {}).get(tensor.name, (1.0, None))
    if original is not None:
        original = original.to(tensor.value)
        if torch.equal(tensor.at(original, factor), tensor.value):
            return factor, original
    return 1.0, tensor.value.detach().clone()  # not scaled, or changed since


def _tensors(model: nn.Module, name: str) -> Iterator[_Tensor]:
    """The tensors to scale, each once although tied layers share some.

    Raises:
        ValueError: if an adapter cannot be scaled.
    """
    found = [(host_name, host, _parts(host, name)) for host_name, host in hosts(model)]
    # An override of a head belongs to the task. It is scaled only if the adapter consists of overrides (BitFit).
    only_overrides = all(isinstance(part, ParameterOverride) for _, _, parts in found for part in parts)
    seen: set[int] = set()
    for host_name, host, parts in found:
        for part in parts:
            if part.is_passthrough or (isinstance(part, ParameterOverride) and not only_overrides):
                continue
            values = part.neutral_values(host)
            if values is None:
                raise ValueError(
                    f"{name!r} at {host_name!r} ({type(part).__name__}) cannot be scaled: {part.unscalable}"
                )
            own = {**dict(part.named_parameters()), **dict(part.named_buffers())}
            for key, neutral in values.items():
                value = own.get(key)  # absent: an option that is off, or a tensor shared within the part
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield _Tensor(part, key, value, neutral)


def _parts(host: nn.Module, name: str) -> list[Adapter]:
    """The adapters called ``name`` on a host; a group of weight adapters is split into its members."""
    stack = cast(Any, host).adapters
    if name not in stack:
        return []
    parts: list[Adapter] = []
    for component in stack[name].components():
        parts += list(component.weights().values()) or [component]
    return parts
