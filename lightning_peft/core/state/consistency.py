"""Compare the record of what methods inserted into a model with the model as it is now.

If user code replaces a module after methods were applied (a resized vocabulary, a new head, fused projections), its
adapters are lost with it, without an error. A base that was built on the meta device gets its values only later. Both
are checked before a fit, a save, a load and a merge.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lightning_peft.core.adapters.effective_weights import stored_tensor
from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.adapters.stack import Adapted
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.names import canonical
from lightning_peft.core.record import InjectionState, injected_module, injection_state
from lightning_peft.core.state.fingerprint import fingerprint
from lightning_peft.core.state.moved_values import InitialValues
from lightning_peft.core.state.state_dict import StateError
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
    modules = {canonical(name): module for name, module in injected_module(model).named_modules()}
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


def _resized(record: InjectionState, name: str, host: str, module: nn.Module) -> str | None:
    if module.adapters.merged is not None:  # type: ignore[union-attr]
        return None
    for part in record.adapter_records.get(name, ()):
        stored = stored_tensor(module, part.parameter) if part.host == host and part.parameter else None
        if stored is None or stored.ndim != len(part.shape) or not stored.numel() or is_packed(module):
            continue  # a strategy that shards has flattened or split it; a packed layer stores no matrix
        if tuple(stored.shape) != tuple(part.shape):
            shapes = " to ".join("x".join(map(str, shape)) for shape in (part.shape, stored.shape))
            return f"{host!r} was resized from {shapes}"
    return None


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
