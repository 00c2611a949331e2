"""Apply methods to a model: plan and check everything, then change the model once.

There is one moment of injection: after the user's modules exist, and before the model is sharded or compiled and the
optimizer is built. Earlier, there is nothing to adapt; later, adapters would not be sharded, compiled or optimized.

Errors (a pattern that matches nothing, a name that is taken, a compiled or sharded model, a class that cannot be
swapped) are found while planning, before anything changes. If the change itself fails or is interrupted, it is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.core.injection.attach import attach
from lightning_peft.core.injection.checks import (
    InjectionError,
    check_hosts,
    check_initialized,
    check_injectable,
    check_order,
    check_saving,
    check_trial,
)
from lightning_peft.core.injection.prepare import Preparation, is_preparation, not_yet_prepared, prepared
from lightning_peft.core.injection.rollback import all_or_nothing, gc_held
from lightning_peft.core.injection.saving_base import watch_saving
from lightning_peft.core.injection.widen_record import widen_record
from lightning_peft.core.names import canonical
from lightning_peft.core.record import InjectionState, TrainedBase, injection_state
from lightning_peft.core.state.adapter_records import adapter_records
from lightning_peft.core.state.consistency import check_record
from lightning_peft.core.state.fingerprint import fingerprint
from lightning_peft.core.state.freezing import (
    freeze_norm_statistics,
    hold_statistics,
    keep_full_precision,
)
from lightning_peft.core.state.moved_values import InitialValues
from lightning_peft.core.state.plan import Method, Plan, unfrozen, without_values
from lightning_peft.core.state.report import Report
from lightning_peft.core.state.state_dict import fix_trained
from lightning_peft.core.targeting.base_modules import base_modules, base_parameters
from lightning_peft.core.targeting.frozen_parts import name_frozen_parts
from lightning_peft.core.targeting.packed import count_parameters, keep_differentiable, packed_note
from lightning_peft.core.targeting.ties import tie_notes, with_tied

__all__ = ["after_injection", "apply", "inspect", "install"]

#: called with the model after each injection; the trainer package registers functions here
after_injection: list[Callable[[nn.Module], None]] = []


@gc_held()
def apply(model: nn.Module, *methods: Method | Preparation) -> Report:
    """Freeze ``model`` and apply ``methods`` to it, without a Trainer or inside ``configure_model``.

    Applying the same methods again changes nothing. A later call with other methods adds them, and parameters that
    already train continue to train. If the later call is for a module around the one with methods, the rest of that
    module is frozen.

    Args:
        model: any module; changed in place.
        *methods: the methods, in order of application. Without any, the callbacks of the attached Trainer. A
            :class:`lightning_peft.QuantizeBase` among them changes the base before the methods are planned; alone, it
            freezes nothing.

    Returns:
        A report of what was done to each module, and the parameter counts.

    Raises:
        TargetError: if a pattern matches nothing.
        InjectionError: if two methods have the same name, the model is compiled or sharded or is part of a model with
            methods, a module cannot take an adapter, an adapter could not be saved, or there is no method.
        StateError: if a module with adapters was replaced or resized after an earlier call.

    Example::

        report = lp.apply(model, lp.LoRA(r=8, trainable=["classifier"]))
        optimizer = torch.optim.AdamW(lp.trainable_parameters(model), lr=1e-3)
    """
    steps, wanted = _split(methods or _callbacks_of(model))
    record = injection_state(model)
    check_record(model)
    new, steps = _not_yet_applied(wanted, record), _not_yet_prepared(model, steps)
    if not (new or steps) and record is not None:
        return record.report
    check_injectable(model)
    with prepared(model, steps) as notes:
        if not new:
            report = Report(notes=notes)
            report.count(model)
            return report
        plans = {method.name: (method, _plan(model, method)) for method in new}
        check_order(model, [plan for _, plan in plans.values()])
        check_trial(model, plans)
        report = install(model, plans, try_saving=True)
        report.note(notes)
    return report


def _split(wanted: Iterable[Method | Preparation]) -> tuple[list[Preparation], list[Method]]:
    steps = [cast(Preparation, each) for each in wanted if is_preparation(each)]
    return steps, [cast(Method, each) for each in wanted if not is_preparation(each)]


def _not_yet_prepared(model: nn.Module, steps: Iterable[Preparation]) -> list[Preparation]:
    try:
        return not_yet_prepared(model, steps)
    except ValueError as error:
        raise InjectionError(str(error)) from error


@gc_held()
def install(model: nn.Module, plans: Mapping[str, tuple[Method, Plan]], try_saving: bool = False) -> Report:
    """Carry out the plans that :func:`apply` made.

    Args:
        model: the model; changed in place.
        plans: each method with its plan, by adapter name.
        try_saving: also check that the adapters could be saved after training.

    Raises:
        InjectionError: if a module cannot take an adapter of that name, or an adapter could not be saved. Nothing was
            changed.
        Exception: if the change fails for any other reason; it is undone.
    """
    check_hosts(model, plans)
    # The trial save needs the adapters attached, so it runs inside the rollback: a failure leaves the model unchanged.
    with all_or_nothing(model):
        report = _install(model, plans)
        for name, (method, _) in plans.items() if try_saving else ():
            check_saving(model, name, getattr(method, "audit", "error"))
    for call in after_injection:
        call(model)
    return report


def _install(model: nn.Module, plans: Mapping[str, tuple[Method, Plan]]) -> Report:
    record = injection_state(model)
    first = record is None
    if record is not None:
        widen_record(model)
    if record is None:
        # Freeze everything first. Each method then unfreezes what it trains, so their order does not matter.
        trained = frozenset(canonical(name) for name, p in model.named_parameters() if p.requires_grad)
        model.requires_grad_(False)
        record = InjectionState({}, Report(), {}, InitialValues(), trained)
    for name, (method, plan) in plans.items():
        _commit(model, method, plan, record.report)
        _record(model, record, name, method, plan)
    # A parameter that one method defers and another one trains is not deferred: it trains from the start.
    record.deferred = {
        n: v for n, v in record.deferred.items() if v is not None or not model.get_parameter(n).requires_grad
    }
    # Statistics would change in train mode although every parameter of the layer is frozen.
    if not any(method.train_norm_stats for method in record.methods.values()):
        frozen = freeze_norm_statistics(model)
        if frozen and first:
            record.report.notes.append(f"{len(frozen)} frozen norm layers keep their running statistics")
    for _, module in base_modules(model):
        keep_differentiable(module)
    record.report.count(model, record.sizes.values())
    record.report.note(packed_note(model))
    watch_saving(model)
    if first:
        record.start = InitialValues.of(model)
        # The record is attached before the fingerprint is computed, which reads from it what trains.
        model.__dict__["_peft_injection"] = record
        record.fingerprint = fingerprint(model, leave_out=record.deferred)
    if any(record.trained_base.values()):
        fix_trained(model, plans)
    return record.report


def _record(model: nn.Module, record: InjectionState, name: str, method: Method, plan: Plan) -> None:
    record.methods[name] = method
    record.deferred |= dict.fromkeys(plan.deferred)
    adapters = any(p.requires_grad for a in plan.attach for p in a.adapter.parameters())
    modules, parameters = with_tied(model, plan.train_modules, plan.train)
    record.trained_base[name] = TrainedBase(modules, (*parameters, *plan.deferred), adapters)
    record.origins[name] = plan.origin
    hosts_of = tuple(dict.fromkeys(canonical(a.host) for a in plan.attach))
    record.add_adapter(name, hosts_of, list(adapter_records(model, name, take=None)), _size(plan))


def inspect(model: nn.Module, *methods: Method | Preparation) -> Report:
    """Report what :func:`apply` would do: the match table and the counts. Nothing is changed.

    Raises:
        TargetError: if a pattern matches nothing.
        InjectionError: if two methods have the same name, a module cannot take an adapter, parameters do not have a
            shape yet, or there is no method.
    """
    steps, wanted = _split(methods or _callbacks_of(model))
    record = injection_state(model)
    new = _not_yet_applied(wanted, record)
    check_initialized(model)
    report = Report() if record is None else record.report.copy()
    report.total = count_parameters(model) + sum(total for _, total in (record.sizes if record else {}).values())
    trained: dict[int, int] = {}
    plans = [_plan_counts(model, method) for method in new]
    check_order(model, plans)
    check_trial(model, {method.name: (method, plan) for method, plan in zip(new, plans)})
    for method, plan in zip(new, plans):
        check_hosts(model, {method.name: (method, plan)})
        for a in plan.attach:
            count = sum(p.numel() for p in a.adapter.parameters() if p.requires_grad)
            report.add(a.shown, a.what, count, method.name)
            report.trainable += count
            report.total += sum(p.numel() for p in a.adapter.parameters())
        for name, parameters, what in unfrozen(model, plan):
            report.add(name, what, sum(p.numel() for p in parameters), method.name)
            trained |= {id(p): p.numel() for p in parameters}
        for name, what in dict.fromkeys(plan.deferred.values()):
            report.add(name, what, 0, method.name)
        report.note([*plan.notes, *tie_notes(model, plan)])
    report.note(packed_note(model))
    report.note(step.prepare(model, preview=True) for step in _not_yet_prepared(model, steps))
    report.trainable += sum(trained.values())
    return report


def _plan(model: nn.Module, method: Method) -> Plan:
    plan = method.plan(model)
    name_frozen_parts(model, plan)
    return plan


def _plan_counts(model: nn.Module, method: Method) -> Plan:
    """Plan without values, which would take as much memory as the adapters, if the method can."""
    try:
        with without_values():
            return _plan(model, method)
    except Exception:  # either the method needs values, or the call below raises the model's own error again
        return _plan(model, method)


def _callbacks_of(model: nn.Module) -> Sequence[Any]:
    trainer = getattr(model, "_trainer", None)
    callbacks: Any = model.__dict__.get("_peft_methods") or getattr(trainer, "callbacks", ())
    found = [c for c in callbacks if (hasattr(c, "plan") and hasattr(c, "config")) or is_preparation(c)]
    if all(map(is_preparation, found)):
        raise InjectionError(
            "no method to apply: pass one, as in lp.apply(model, lp.LoRA(r=8)), or attach it to the Trainer "
            "as a callback"
        )
    return found


def _not_yet_applied(methods: Iterable[Method], record: InjectionState | None) -> list[Method]:
    new: dict[str, Method] = {}
    for method in methods:
        kind = type(method).__name__
        if method.name in new:
            raise InjectionError(
                f"two methods are named {method.name!r} ({type(new[method.name]).__name__} and {kind}): give each "
                f"its own name, for example {kind}(..., name='{kind.lower()}')"
            )
        there = record.methods.get(method.name) if record is not None else None
        if there is None:
            new[method.name] = method
        elif type(there) is not type(method) or there.config() != method.config():
            raise InjectionError(
                f"the model already carries a {type(there).__name__} named {method.name!r} with a different "
                f"configuration: {_difference(there.config(), method.config())}; give this one another name="
            )
    return list(new.values())


def _difference(there: dict[str, object], here: dict[str, object]) -> str:
    changed = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    return ", ".join(f"{k}={there.get(k)!r} there, {here.get(k)!r} here" for k in changed) or "a different class"


def _commit(model: nn.Module, method: Method, plan: Plan, report: Report) -> None:
    for a in plan.attach:
        owners = (model.get_submodule(a.host), model)
        # A host without parameters (an activation, a norm without weights) gets its adapters on the model's device.
        reference = next((p for owner in owners for p in owner.parameters()), None)
        if reference is not None and not reference.is_meta:
            a.adapter.to(reference.device)
        attach(model, a.host, method.name, a.adapter)
        report.add(a.shown, a.what, sum(p.numel() for p in a.adapter.parameters() if p.requires_grad), method.name)
    for name, parameters, what in unfrozen(model, plan):
        for parameter in parameters:
            parameter.requires_grad_(True)
        report.add(name, what, sum(p.numel() for p in parameters), method.name)
    for name, what in dict.fromkeys(plan.deferred.values()):
        report.add(name, what, 0, method.name)
    report.note([*plan.notes, *tie_notes(model, plan)])
    # The whole model ("") is left out: full fine-tuning uses the dtype that the user chose.
    keep_full_precision((model.get_submodule(name) for name in plan.train_modules if name), _shared(model))
    for name in plan.hold_statistics:
        hold_statistics(model.get_submodule(name))


def _size(plan: Plan) -> tuple[int, int]:
    """Return the number of parameters in the adapters of ``plan`` that train, and of all of them."""
    found = {p for a in plan.attach for p in a.adapter.parameters()}
    return sum(p.numel() for p in found if p.requires_grad), sum(p.numel() for p in found)


def _shared(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in base_parameters(model, remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
