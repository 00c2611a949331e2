"""Compare the record of what methods inserted into a model with the model as it is now.

If user code replaces a module after methods were applied (a resized vocabulary, a new head, fused projections), its
adapters are lost with it, without an error. A base that was built on the meta device gets its values only later. Both
are checked before a fit, a save, a load and a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.adapters.stack import Adapted, AdapterStack
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.names import canonical
from lightning_peft.core.record import InjectionState, injected_module, injection_state
from lightning_peft.core.state.fingerprint import fingerprint
from lightning_peft.core.state.moved_values import InitialValues
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.computed_weights import steady_tensor
from lightning_peft.core.targeting.packed import is_packed

__all__ = ["check_record", "update_base"]


def check_record(model: nn.Module) -> None:
    """Check that all adapters of the record are still attached, to weights of the shape they were created for.

    Raises:
        StateError: if modules were replaced or resized; the message lists them.
    """
    record = injection_state(model)
    if record is None:
        return
    modules = {canonical(name): module for name, module in base_modules(injected_module(model))}
    if _is_complete(record, modules):
        return
    lost: dict[str, list[str]] = {}
    for name, found in record.hosts.items():
        for host in found:
            module = modules.get(host)
            if module is None or not has_mixin(module, Adapted) or name not in module.adapters:  # type: ignore[operator]
                lost.setdefault(name, []).append(f"{host!r} was replaced and no longer carries it")
            elif problem := _resized(record, name, host, module):
                lost.setdefault(name, []).append(problem)
    for name, trains in record.trained_base.items():
        gone = [m for m in trains.modules if m not in modules]
        lost |= {name: [*lost.get(name, ()), *(f"{m!r}, which it trains, is gone" for m in gone)]} if gone else {}
    if lost:
        what = "; ".join(f"adapter {n!r}: {', '.join(w[:4])}{' ...' if len(w) > 4 else ''}" for n, w in lost.items())
        raise StateError(
            f"the model was changed after the methods were applied. {what}. Change modules (vocabulary, head, fused "
            "layers) before you apply methods; lp.unload(model) returns the model without them"
        )


def _is_complete(record: InjectionState, modules: Mapping[str, nn.Module]) -> bool:
    """Whether every module carries as many adapters as recorded, on weights of the recorded shapes.

    The time does not depend on the number of adapters. Lost adapters are not named.
    """
    if any(module not in modules for trains in record.trained_base.values() for module in trains.modules):
        return False
    for host, count in record.carried.items():
        stack = modules[host]._modules.get("adapters") if host in modules else None
        if not isinstance(stack, AdapterStack) or len(stack._modules) != count:
            return False
    return all(_new_shape(modules[host], parameter, shape) is None for host, parameter, shape in record.shapes)


def _resized(record: InjectionState, name: str, host: str, module: nn.Module) -> str | None:
    for part in record.adapter_records.get(name, ()):
        new = _new_shape(module, part.parameter, tuple(part.shape)) if part.host == host else None
        if new is not None:
            return f"{host!r} was resized from {' to '.join('x'.join(map(str, s)) for s in (part.shape, new))}"
    return None


def _new_shape(host: nn.Module, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a host's weight if it is not ``shape`` any more; None if it is, or cannot be compared."""
    if not parameter or cast(AdapterStack, host._modules["adapters"]).merged is not None:
        return None
    stored = steady_tensor(host, parameter)
    if stored is None or stored.ndim != len(shape) or not stored.numel() or is_packed(host):
        return None  # a strategy that shards has flattened or split it; a packed layer stores no matrix
    return None if tuple(stored.shape) == shape else tuple(stored.shape)


def update_base(model: nn.Module) -> None:
    """Fingerprint a base that was on the meta device when methods were applied, now that it may have values."""
    record, root = injection_state(model), injected_module(model)
    if record is None or any(stack.merged is not None for stack in stacks(root).values()):
        return
    if any(buffer.is_meta for buffer in record.start.buffers.values()):
        record.start = replace(InitialValues.of(root), parameters=record.start.parameters)
    elif record.fingerprint.get("values"):
        return
    record.fingerprint = fingerprint(root, leave_out=record.deferred)
