"""Merge adapters into the base weights, and restore the base weights bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import cast

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import adapter_names, check_known, hosts, stacks
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.class_swap import original_class, own_forward
from lightning_peft.core.injection.merge_plan import MergeError, MergePlan, changed_tensors, restore
from lightning_peft.core.injection.merged_values import merged_values
from lightning_peft.core.injection.plain_layer import plain_dtype
from lightning_peft.core.injection.quantizer_marks import drop_marks, restore_marks
from lightning_peft.core.names import canonical, listed
from lightning_peft.core.record import injection_state
from lightning_peft.core.sharded_tensors import flat_part
from lightning_peft.core.state.consistency import check_record
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import base_parameters
from lightning_peft.core.targeting.packed import COMPRESSED, is_compressed, is_packed
from lightning_peft.core.targeting.ties import tied_names

__all__ = ["MergeError", "merge", "unmerge"]


@torch.no_grad()
def merge(
    model: nn.Module,
    name: str | None = None,
    partial: bool = False,
    untie: bool = False,
    dequantize: bool = False,
) -> list[str]:
    """Merge the active adapters, or the adapter ``name``, into the base weights.

    New weights are computed in float32 in eval mode (no dropout), and rounded once to the weight's dtype, one module
    after the other. The original weights are kept for :func:`unmerge`.

    Args:
        model: the adapted model; changed in place.
        name: the adapter to merge; by default, all active adapters.
        partial: merge the adapters that can be merged and keep running the others unmerged, instead of raising.
        untie: allow merging into a weight that several modules share (an embedding tied to the output head) when it
            changes in only one of them. That module then gets its own copy, and :func:`unmerge` ties the weight again.
            By default, this is an error. If all modules change in the same way, the weight stays shared.
        dequantize: replace a quantised layer by a plain ``nn.Linear`` with the merged weight, which takes more memory;
            :func:`unmerge` restores the quantised one. By default, merging into a quantised weight is an error.

    Returns:
        The adapters that stay unmerged, each with its place and the reason; empty unless ``partial``.

    Raises:
        MergeError: if an adapter is not a weight update, or its order relative to an unmerged one matters; if a weight
            is shared with other modules; if a module was replaced or resized; if a result is not finite; if adapters
            are already merged; if the model has no methods; or if no adapter is active and none is named. With
            ``partial``, only if nothing can be merged. The model is unchanged.
        ValueError: if there is no adapter of that name.
    """
    _check_mergeable(model, name)
    plans, tied, left = _planned(model, name, untie, dequantize)
    _refuse(left, partial, plans)
    try:
        for plan in [*plans]:
            try:
                plan.write(tied)
            except MergeError as error:
                plans.remove(plan)
                for n in plan.names:
                    left.setdefault(n, []).append(str(error))
        _refuse(left, partial, plans)
        if any(plan.stack.packed is not None for plan in plans):
            drop_marks(model)
    except BaseException:  # restore the hosts that were already written, also after KeyboardInterrupt
        unmerge(model)
        raise
    return _reasons(left)


def _check_mergeable(model: nn.Module, name: str | None) -> None:
    """Check that there is something to merge.

    Raises:
        MergeError: if the model has no adapters, or no active one, or if its modules were replaced.
        ValueError: there is no adapter ``name``.
    """
    try:
        check_record(model)
    except StateError as error:
        raise MergeError(str(error)) from error
    if injection_state(model) is None and not stacks(model):
        raise MergeError(
            f"{type(model).__name__} has no adapters, so there is nothing to merge: attach a method, or load an "
            "adapter with lp.load_adapter"
        )
    if parts := [canonical(n) for n, p in base_parameters(model) if flat_part(p) is not None]:
        raise MergeError(
            f"FSDP1 has split {listed(parts)}, so this process does not have the weights to merge into: load the run's "
            "checkpoint with lp.load_from_checkpoint, and merge there"
        )
    if name is not None:
        check_known(model, name)
    elif (found := stacks(model)) and not any(stack.active for stack in found.values()):
        raise MergeError(
            f"none of {list(adapter_names(model))} is active: call lp.set_active(model, ...) first, or name one"
        )


def _planned(
    model: nn.Module, name: str | None, untie: bool, dequantize: bool
) -> tuple[list[MergePlan], dict[str, list[str]], dict[str, list[str]]]:
    """Plan the merge without changing the model.

    Returns:
        The plans of the hosts that can be merged; the result of :func:`_tied` for all plans; and, by adapter, why it
        cannot be merged somewhere.

    Raises:
        MergeError: adapters are already merged.
    """
    plans: list[MergePlan] = []
    left: dict[str, list[str]] = {}  # why, by adapter
    shared = tied_names(model)
    dtype = plain_dtype(model) if dequantize else None
    for host_name, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        if stack.merged is not None:
            raise MergeError(f"{host_name!r} already has merged adapters: call lp.unmerge(model) first")
        names, reasons = _mergeable(host_name, host, name)
        try:
            if names:
                _check_packed(host_name, host, names, dequantize)
                plans.append(MergePlan(host_name, host, names, shared, dtype))
        except MergeError as error:
            reasons |= {n: str(error) for n in names}
        for n, reason in reasons.items():
            left.setdefault(n, []).append(reason)
    tied = _tied(shared, plans)
    for plan in plans if not untie else ():
        for full in (full for full in plan.parameters.values() if full in tied):
            reason = f"{full} is the same tensor as {tied[full]}, which would change too: {_UNTIE}"
            for n in plan.names:
                left.setdefault(n, []).append(reason)
    if not untie:
        plans = [plan for plan in plans if tied.keys().isdisjoint(plan.parameters.values())]
    return plans, tied, left


def _refuse(left: Mapping[str, list[str]], partial: bool, plans: Collection[MergePlan]) -> None:
    if left and not (partial and plans):
        also = " (lp.merge(model, partial=True) merges the others)" if plans else ""
        raise MergeError(f"{'; '.join(_reasons(left))}{also}")


_UNTIE = "lp.merge(model, untie=True) gives it its own copy"


def _tied(shared: Mapping[str, list[str]], plans: Iterable[MergePlan]) -> dict[str, list[str]]:
    """Return shared tensors that cannot be written in place, because their new values differ between their names.

    Each is returned under its name, with its other names.
    """
    new = {full: plan.weights().get(p) for plan in plans for p, full in plan.parameters.items() if full in shared}
    found: dict[str, list[str]] = {}
    for name in new:
        values = [new.get(other) for other in shared[name]]
        first = values[0]
        if first is None or any(value is None or not torch.equal(first, value) for value in values):
            found[name] = [other for other in shared[name] if other != name]
    return found


def _check_packed(host_name: str, host: nn.Module, names: Iterable[str], dequantize: bool) -> None:
    """Check that the adapters ``names`` do not change a packed weight, unless it may become a plain one.

    Raises:
        MergeError: if they do.
    """
    stack = cast(AdapterStack, host.adapters)
    if is_compressed(host):
        raise MergeError(f"{host_name!r} {COMPRESSED}")
    if not is_packed(host) or all("weight" not in cast(Adapter, stack[n]).changes() for n in names):
        return
    what = (
        f"{host_name!r} ({original_class(host).__name__}) has a quantised weight, which cannot hold the merged values"
    )
    if not dequantize:
        raise MergeError(f"{what}: lp.merge(model, dequantize=True) replaces the layer by a float one")
    if own_forward(host) is not None:
        raise MergeError(f"{what}, and its forward was replaced on the instance, so it cannot become a plain layer")


def _mergeable(host_name: str, host: nn.Module, name: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the adapters on one host that can be merged, in order, and the reason for each one that cannot."""
    stack = cast(AdapterStack, host.adapters)
    names: tuple[str, ...] = ()
    reasons: dict[str, str] = {}
    for n in stack.active if name is None else [n for n in stack if n == name]:
        adapter = cast(Adapter, stack[n])
        where = f"{n!r} at {repr(host_name) if host_name else 'the model itself'} ({type(adapter).__name__})"
        if adapter.is_passthrough:
            continue
        if any(changed_tensors(part) is None for part in adapter.components()):
            reasons[n] = f"{where} does not change weights"
        elif reasons:
            reasons[n] = f"{where} runs after {next(iter(reasons))!r}, but merged it would run before it"
        elif name is not None and (reason := _order_problem(host_name, host, name)):
            reasons[n] = reason
        else:
            names += (n,)
    return names, reasons


def _reasons(left: Mapping[str, list[str]]) -> list[str]:
    """Return one sentence for each adapter, with the number of its other places."""

    def more(n: int) -> str:
        return f", and so at {n} more place{'s' if n > 1 else ''}" if n else ""

    return [reasons[0] + more(len(reasons) - 1) for reasons in left.values()]


def _order_problem(host_name: str, host: nn.Module, name: str) -> str | None:
    """Return why ``name`` cannot be merged alone; None if it can.

    A merged adapter runs before all unmerged ones, also before those that it ran after until then. This is allowed only
    if the result stays the same.
    """
    stack = cast(AdapterStack, host.adapters)
    order = list(stack)
    mine = cast(Adapter, stack[name]).components()
    earlier = [n for n in stack.active if order.index(n) < order.index(name)]
    before = {n: a.components() for n in earlier if not (a := cast(Adapter, stack[n])).is_passthrough}
    touched = {n: [changed_tensors(part) for part in parts] for n, parts in before.items()}
    own = set().union(*(changed_tensors(part) or () for part in mine))
    meets = [n for n, sets in touched.items() if any(t is None or t & own for t in sets)]
    if not meets:
        return None
    reason = (
        f"{name!r} at {host_name!r} runs after {meets[0]!r}, but merged alone it would run before it and change the "
        f"result: merge both, or make only {name!r} active"
    )
    if any(t is None for n in meets for t in touched[n]):
        return reason
    others = [part for parts in before.values() for part in parts]
    try:
        now, then = (merged_values(host, parts) for parts in ([*others, *mine], [*mine, *others]))
    except MergeError as error:
        return str(error)
    return None if all(_equal(now[p], then[p]) for p in now) else reason


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are equal up to the rounding of differently ordered sums."""
    if a.shape != b.shape:
        return False
    eps = torch.finfo(a.dtype if a.is_floating_point() else torch.float32).eps
    return bool((a - b).abs().max() <= 64 * eps * a.abs().max())


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the weights that :func:`merge` replaced, bit for bit; the adapters run unmerged again."""
    # In reverse order, because for a shared tensor only the host that was merged first kept the original value.
    for _, host in reversed([*hosts(model)]):
        restore(host)
    restore_marks(model)
