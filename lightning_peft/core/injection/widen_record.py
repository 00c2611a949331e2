"""Move the record of an adapted submodule to a module around it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lightning_peft.core.names import canonical, join
from lightning_peft.core.record import TrainedBase, injected_name, injection_state
from lightning_peft.core.state.fingerprint import fingerprint

__all__ = ["widen_record"]


def widen_record(model: nn.Module, freeze: bool = True) -> None:
    """Move the record from the adapted submodule to ``model``, the module around it, and convert its names.

    Does nothing if the record already belongs to ``model``.

    Args:
        model: the module around the adapted one.
        freeze: freeze the rest of ``model``. If False, parameters that require gradients there continue to train.
    """
    record, inner = injection_state(model), injected_name(model)
    if record is None or not inner:
        return

    def outer(name: str) -> str:
        return join(inner, name)

    inside = model.get_submodule(inner)
    rest = {id(p) for p in model.parameters()} - {id(p) for p in inside.parameters()}
    others = {canonical(name): p for name, p in model.named_parameters() if id(p) in rest and p.requires_grad}
    for parameter in others.values() if freeze else ():
        parameter.requires_grad_(False)
    record.trained_before = frozenset(others.keys() | {outer(name) for name in record.trained_before})
    record.deferred = {outer(name): value for name, value in record.deferred.items()}
    record.trained_base = {
        adapter: TrainedBase(tuple(map(outer, trains.modules)), tuple(map(outer, trains.parameters)), trains.adapters)
        for adapter, trains in record.trained_base.items()
    }
    for adapter in list(record.hosts):
        found, size = record.hosts[adapter], record.sizes[adapter]
        parts = [replace(part, host=outer(part.host)) for part in record.adapter_records[adapter]]
        record.remove_adapter(adapter)
        record.add_adapter(adapter, tuple(map(outer, found)), parts, size)
    record.report.entries = [entry._replace(module=outer(entry.module)) for entry in record.report.entries]
    record.also_trained, record.moved = set(map(outer, record.also_trained)), set(map(outer, record.moved))
    record.also_trained |= set() if freeze else others.keys()
    record.start = record.start.around(model, inner)
    model.__dict__["_peft_injection"] = inside.__dict__.pop("_peft_injection")
    record.report.count(model, record.sizes.values())
    record.fingerprint = fingerprint(model, leave_out=record.deferred)
