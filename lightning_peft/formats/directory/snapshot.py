"""Collect the facts and tensors of one adapter of a model, from which an adapter directory is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import hosts, stack_prefixes, stacks
from lightning_peft.core.names import canonical, is_within, join
from lightning_peft.core.record import InjectionState, injected_module, injection_state
from lightning_peft.core.state.adapter_records import AdapterRecord, adapter_records, gather_to_cpu
from lightning_peft.core.state.consistency import check_record, update_base
from lightning_peft.core.state.fingerprint import fingerprint_now
from lightning_peft.core.state.state_dict import StateError, trainable_keys
from lightning_peft.core.targeting.base_model import Base, base_of
from lightning_peft.core.targeting.base_modules import base_state_dict
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["Snapshot", "take_snapshot"]


@dataclass
class Snapshot:
    """Everything that one method added to a model or trained in it. Names are relative to the base.

    Attributes:
        method: The method, with its configuration.
        adapter_records: One record per adapted weight or module.
        heads: Names of the modules that the method trains in full.
        trained: Name -> value of the base's own parameters and buffers that it trained (heads, biases, statistics).
        base: The base model.
        fingerprint: The fingerprint of the frozen base.
        metrics: Metrics of the run that trained it, if they are known.
        take: Returns the tensor to write for a tensor of the model.
        origin: Options of the file that the adapter was read from, to be written again.
    """

    method: PEFTMethod
    adapter_records: list[AdapterRecord]
    heads: list[str]
    trained: dict[str, Tensor]
    base: Base
    fingerprint: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    take: Callable[[Tensor], Tensor] = gather_to_cpu
    origin: dict[str, Any] = field(default_factory=dict)


def take_snapshot(model: nn.Module, name: str, take: Callable[[Tensor], Tensor] = gather_to_cpu) -> Snapshot:
    """Collect the snapshot of the adapter ``name``.

    Args:
        model: An adapted module.
        name: The adapter's name.
        take: Returns the tensor to write for a tensor of the model, by default a full copy on the CPU.

    Raises:
        ValueError: if the model has no adapter of that name.
        StateError: if adapters are merged into the weights, or an adapted module was replaced or resized.
    """
    record = injection_state(model)
    if record is None:
        raise ValueError("this model has no adapters: call lp.apply(model, ...), or train it with a method, first")
    if name not in record.methods:
        raise ValueError(f"no adapter named {name!r}; the model has {list(record.methods)}")
    root = injected_module(model)
    if any(stack.merged is not None for stack in stacks(root).values()):
        raise StateError("adapters are merged into the base, so its weights have changed: call lp.unmerge(model) first")
    check_record(root)
    update_base(root)
    base = base_of(root, _used(root, record))
    return Snapshot(
        method=cast(PEFTMethod, record.methods[name]),
        adapter_records=list(adapter_records(base.module, name, take)),
        heads=_heads(base, record, name),
        trained={key: take(value) for key, value in (_trained(base, record, name) | _overrides(base, name)).items()},
        base=base,
        fingerprint=_fingerprint(base, record),
        take=take,
        origin=record.origins.get(name, {}),
    )


def _used(root: nn.Module, record: InjectionState) -> list[str]:
    trained = [name for trains in record.trained_base.values() for name in (*trains.modules, *trains.parameters)]
    return [*(canonical(name) for name, _ in hosts(root)), *trained]


def _overrides(base: Base, name: str) -> dict[str, Tensor]:
    """The adapter's overrides of base parameters, by name in the base."""
    found = {}
    for host_name, stack in stacks(base.module).items():
        for part in cast(Adapter, stack[name]).components() if name in stack else ():
            for key, value in part.overrides().items():
                found[join(canonical(host_name), key)] = value
    return found


def _heads(base: Base, record: InjectionState, name: str) -> list[str]:
    in_full = record.trained_base[name].modules or cast(PEFTMethod, record.methods[name]).trainable_modules(base.root)
    return [cast(str, base.inner(head)) for head in in_full]


def _trained(base: Base, record: InjectionState, name: str) -> dict[str, Tensor]:
    trains, statistics = record.trained_base[name], record.methods[name].train_norm_stats
    if not (trains.modules or trains.parameters or statistics):
        return {}
    state = {canonical(key): value for key, value in base.root.state_dict().items()}
    adapters, trained = stack_prefixes(base.root), (*trains.modules, *trains.parameters)
    wanted = {key for key in state if is_within(key, *trained) and not key.startswith(adapters)}
    if statistics:
        wanted |= trainable_keys(base.root) & dict(base.root.named_buffers()).keys()
    return {cast(str, base.inner(key)): state[key] for key in sorted(wanted)}


def _fingerprint(base: Base, record: InjectionState) -> dict[str, Any]:
    state = {canonical(key): value for key, value in base_state_dict(base.root, keep_vars=True).items()}
    now = fingerprint_now(record.fingerprint, state, {join(host, weight) for host, weight, _ in record.shapes})
    values = {base.inner(name): value for name, value in now["values"].items()}
    return {
        "values": {name: value for name, value in values.items() if name},
        "packed": now.get("packed", {}),
        "prepared": now.get("prepared", []),
    }
