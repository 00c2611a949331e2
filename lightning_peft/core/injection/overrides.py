"""Replace parameters of the base by an adapter's own values while that adapter is active.

A method that trains parameters of the base (heads in ``trainable``, biases, norms) changes them for every adapter. A
:class:`ParameterOverride` stores these values in an adapter instead, and leaves the base unchanged. Each task then has
its own head (of a different width if the layer allows it), biases and statistics, which are switched, merged and
removed like any adapter. Adapters run in order: an override hides the results of earlier adapters for that parameter,
and later adapters start from the override.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import adapter_key, join, nearest
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.ops.finite import is_finite

__all__ = ["ParameterOverride", "override_trained", "parameter_overrides", "saved_overrides"]


class ParameterOverride(Adapter):
    """Values that replace some of a host's parameters and persistent buffers while the adapter runs.

    Args:
        overrides: the values by name in the host, such as ``out_proj.weight`` of an ``nn.MultiheadAttention``. A value
            that is an ``nn.Parameter`` is registered as it is; other tensors become buffers.
    """

    unscalable = "it replaces a value of the base by one of a different shape. Make the widths equal"

    def __init__(self, overrides: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stored_as: dict[str, str] = {}
        for name, value in overrides.items():
            child, _, last = name.rpartition(".")
            if child and child not in self._modules:
                self.add_module(child, nn.Module())
            owner = self.get_submodule(child)
            key = f"{last}_" if hasattr(owner, last) else last  # a parameter may be named like a method, such as 'run'
            if isinstance(value, nn.Parameter):
                owner.register_parameter(key, value)
            else:
                owner.register_buffer(key, value)
            self.stored_as[name] = join(child, key)

    @property
    def modifies_weight(self) -> bool:
        return True

    def overrides(self) -> Mapping[str, Tensor]:
        return {
            name: stored for name, key in self.stored_as.items() if (stored := stored_tensor(self, key)) is not None
        }

    def neutral_values(self, host: nn.Module) -> Mapping[str, Tensor | float] | None:
        found: dict[str, Tensor | float] = {}
        for name, value in self.overrides().items():
            stored = stored_tensor(host, name)
            if stored is None or stored.shape != value.shape:
                return None
            if value.is_floating_point():
                found[self.stored_as[name]] = stored
        return found

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, copy.shape))}" for name, copy in self.overrides().items())


def parameter_overrides(
    model: nn.Module, state: Mapping[str, Tensor], trainable: bool = False
) -> dict[str, ParameterOverride]:
    """Return adapters that replace values of the base by ``state``.

    A tensor that the base holds under several names (tied weights) is replaced only under the names in ``state``. Names
    with equal values share one tensor, so they stay tied. Use :func:`under_all_names` to replace all names.

    Args:
        model: the base, with or without adapters; not changed.
        state: values by full name in ``model``, for parameters and persistent buffers of the base. A weight and its
            bias may have a different number of outputs if the layer allows it: ``nn.Linear``, ``nn.Conv1d/2d/3d`` with
            one group, and the number of entries of an ``nn.Embedding``.
        trainable: whether the values train.

    Returns:
        One adapter for each affected module, by the module's name.

    Raises:
        StateError: if the base does not have a name, or a value does not fit or is not finite; the message lists them.
    """
    places = dict(_base_tensors(model))
    problems = [f"{name}: {_unknown(name, places)}" for name in state if name not in places]
    given = {name: state[name] for name in state if name in places}
    for name in (n for n in places if n in given):
        if (problem := _problem(given[name], places[name]) or _width_mismatch(name, given, places)) is not None:
            problems.append(f"{name}: {problem}")
    if problems:
        raise StateError("the state cannot replace parameters of this model:\n  " + "\n  ".join(problems[:12]))
    held: dict[int, list[Tensor]] = {}  # by id of the base's tensor: tied names with equal values share one copy
    hosts: dict[str, dict[str, Tensor]] = {}
    for name in (n for n in places if n in given):
        place, value = places[name], given[name]
        same = held.setdefault(id(place.tensor), [])
        copy = next((c for c in same if c.shape == value.shape and torch.equal(c, value)), None)
        if copy is None:
            copy = value.detach().clone()
            if isinstance(place.tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=trainable and copy.is_floating_point())
            same.append(copy)
        hosts.setdefault(place.host, {})[place.name] = copy
    return {host: ParameterOverride(overrides) for host, overrides in hosts.items()}


def override_trained(
    plan: Plan, model: nn.Module, state: Mapping[str, Tensor], trainable: bool = False
) -> dict[str, ParameterOverride]:
    """Change ``plan`` to override base parameters with ``state`` instead of training them in the base.

    Args:
        plan: the plan of a method for ``model``; changed in place.
        model, state, trainable: see :func:`parameter_overrides`, whose result is returned.

    Raises:
        StateError: if :func:`parameter_overrides` raises it.
    """
    found = parameter_overrides(model, state, trainable)
    for host, adapter in found.items():
        plan.attach.append(Attachment(host, host, adapter, f"own {', '.join(adapter.stored_as)}"))
    plan.train, plan.train_modules, plan.deferred, plan.hold_statistics = {}, [], {}, []
    return found


def saved_overrides(plan: Plan, model: nn.Module, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Recover the ``state`` that :func:`override_trained` was given for the adapter ``name`` from a model's state.

    Args:
        plan: the plan of the adapter's method for ``model``.
        model: the base, without that adapter.
        name: the adapter's name.
        state: the saved state, by key.
    """
    others = {adapter_key(a.host, name, key) for a in plan.attach for key in a.adapter.state_dict()}
    found: dict[str, Tensor] = {}
    for full, place in _base_tensors(model):
        for beside in ("replacement.", ""):
            for end in ("", "_"):
                key = f"{adapter_key(place.host, name)}.{beside}{place.name}{end}"
                if key in state and key not in others:
                    found[full] = state[key]
    return found


@dataclass(frozen=True)
class _BaseTensor:
    """A parameter or buffer of the base.

    Attributes:
        host: the name of the module that would carry its override.
        owner: the module that holds it.
        name: its name relative to the host.
        tensor: its value.
    """

    host: str
    owner: nn.Module
    name: str
    tensor: Tensor


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, _BaseTensor]]:
    """Yield every parameter and buffer that can be overridden, under each of its full names."""
    hosts: dict[int, tuple[str, str]] = {}  # a module's id: the host's name, and the prefix of names in the host
    for name, module in base_modules(model):
        hosts.setdefault(id(module), (name, ""))
        if isinstance(module, nn.MultiheadAttention):
            hosts[id(module.out_proj)] = (name, "out_proj.")  # its weight is read, but the module is never called
    for name, module in base_modules(model, remove_duplicate=False):
        host, prefix = hosts[id(module)]
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                yield join(name, key), _BaseTensor(host, module, f"{prefix}{key}", tensor)


def _unknown(name: str, places: Iterable[str]) -> str:
    near = nearest(name, list(places), n=1)
    return "the base has no such parameter or buffer" + (f"; nearest: {near[0]}" if near else "")


def _problem(value: Tensor, place: _BaseTensor) -> str | None:
    """Return why ``value`` cannot replace the tensor at ``place``; None if it can."""
    owner, base = place.owner, place.tensor
    kind: Any = original_class(owner)
    if isinstance(owner, parametrize.ParametrizationList) or any(
        hasattr(hook, "compute_weight") for hook in owner._forward_pre_hooks.values()
    ):
        return "a weight is computed from it before the module runs: remove the parametrization first"
    if base.is_floating_point() != value.is_floating_point():
        return f"{value.dtype} given, {base.dtype} in the base"
    if value.is_floating_point() and not is_finite(value):
        return "holds NaN or infinity"
    if value.shape == base.shape:
        return None
    shapes = f"{tuple(value.shape)} given, {tuple(base.shape)} in the base"
    wider = [k for k in _OTHER_WIDTHS if isinstance(owner, k) and kind.forward is k.forward]
    if not wider or "." in place.name or value.shape[1:] != base.shape[1:] or not value.ndim or not len(value):
        return shapes
    if getattr(owner, "groups", 1) != 1 or (getattr(owner, "padding_idx", None) or 0) >= len(value):
        return f"{shapes}, but the layer's groups or padding index require the base's number"
    return None


#: layers that can run with a different number of outputs (for an embedding, entries)
_OTHER_WIDTHS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def _width_mismatch(name: str, given: Mapping[str, Tensor], places: Mapping[str, _BaseTensor]) -> str | None:
    """Return an error text if a weight and a bias in ``given`` have different widths; None if they agree."""
    place, value = places[name], given[name]
    if value.shape == place.tensor.shape:
        return None
    for other, sibling in places.items():
        if (
            sibling.owner is place.owner
            and sibling is not place
            and len(given.get(other, sibling.tensor)) != len(value)
        ):
            return f"has {len(value)} outputs, but {other} has {len(given.get(other, sibling.tensor))}: replace both"
    return None
