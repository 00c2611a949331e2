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
from lightning_peft.core.injection.merged_values import merged_values
from lightning_peft.core.injection.plain_layer import make_packed, make_plain, plain_dtype
from lightning_peft.core.injection.quantizer_marks import drop_marks, restore_marks
from lightning_peft.core.injection.write_back import shared_source, write_back
from lightning_peft.core.names import is_adapter_key, join
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.consistency import check_record
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.computed_weights import (
    is_computed,
    refresh,
    stored_tensor,
)
from lightning_peft.core.targeting.packed import COMPRESSED, is_compressed, is_packed
from lightning_peft.core.targeting.ties import tied_names
from lightning_peft.ops.finite import is_finite

__all__ = ["MergeError", "merge", "unmerge"]


class MergeError(ValueError):
    """Adapters cannot be merged into the base. Nothing was changed."""


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
            ``partial``, if nothing can be merged. The model is unchanged.
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
        MergeError: the model has no adapters, none that is active, or its modules were replaced.
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
    if name is not None:
        check_known(model, name)
    elif (found := stacks(model)) and not any(stack.active for stack in found.values()):
        raise MergeError(
            f"none of {list(adapter_names(model))} is active: call lp.set_active(model, ...) first, or name one"
        )


def _planned(
    model: nn.Module, name: str | None, untie: bool, dequantize: bool
) -> tuple[list[_MergePlan], dict[str, list[str]], dict[str, list[str]]]:
    """Plan the merge without changing the model.

    Returns:
        The plans of the hosts that can be merged; the result of :func:`_tied` for all plans; and, by adapter, why it
        cannot be merged somewhere.

    Raises:
        MergeError: adapters are already merged.
    """
    plans: list[_MergePlan] = []
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
                plans.append(_MergePlan(host_name, host, names, shared, dtype))
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


def _refuse(left: Mapping[str, list[str]], partial: bool, plans: Collection[_MergePlan]) -> None:
    if left and not (partial and plans):
        also = " (lp.merge(model, partial=True) merges the others)" if plans else ""
        raise MergeError(f"{'; '.join(_reasons(left))}{also}")


_UNTIE = "lp.merge(model, untie=True) gives it its own copy"


class _MergePlan:
    """The new values of one host's parameters, after merging the adapters ``names`` in order.

    Attributes:
        parameters: the full name of each tensor that changes, by its name in the host.
        dtype: the dtype of the plain weight that replaces a packed one, if the layer itself does not determine it.

    Raises:
        MergeError: if a weight that is shared with other modules would not be finite.
    """

    def __init__(
        self,
        host_name: str,
        host: nn.Module,
        names: tuple[str, ...],
        shared: Mapping[str, list[str]],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.host_name, self.host, self.names, self.dtype = host_name, host, names, dtype
        self.stack = cast(AdapterStack, host.adapters)
        parts = [part for name in names for part in cast(Adapter, self.stack[name]).components()]
        touched = sorted({p for part in parts for p in _changed_tensors(part) or ()})
        self.parameters = {p: join(host_name, p) for p in touched}
        self.computed = [p for p in touched if is_computed(host, p)]
        for p in self.computed:
            if (problem := shared_source(host_name, host, p, shared)) is not None:
                raise MergeError(problem)
        # The new values of shared tensors are computed before any host is written: they are compared between hosts, and
        # all must start from the original value.
        self._weights = None if shared.keys().isdisjoint(self.parameters.values()) else self._compute()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the new values by name in the host."""
        return self._compute() if self._weights is None else self._weights

    def _compute(self) -> dict[str, torch.Tensor]:
        return _merged_weights(self.host_name, self.host, self.names)

    def write(self, tied: Mapping[str, list[str]]) -> None:
        """Write the new values in place and keep copies of the old ones.

        A parameter in ``tied`` is replaced by a new one, and the old object is kept, so that the other modules that
        share it are unaffected.

        Raises:
            MergeError: if a value is not finite, or the parameters that a weight is computed from cannot express its
                new value; nothing was changed.
        """
        weights = self.weights()
        # Recorded before each tensor is written, so that _restore undoes a write that is interrupted.
        self.stack.merged, self.stack.merged_names = {}, self.names
        if is_packed(self.host) and "weight" in weights:
            try:
                self.stack.packed = make_plain(self.host, weights, self.dtype)
            except TypeError as error:
                self.stack.merged, self.stack.merged_names = None, ()
                raise MergeError(f"{self.host_name!r} cannot become a plain layer: {error}") from error
            self.stack.merged = dict.fromkeys(weights)
            weights = {}
        try:
            for name in self.computed:
                self.stack.merged |= write_back(self.host_name, self.host, name, weights.pop(name))
        except ValueError as error:
            _restore(self.host)
            raise MergeError(str(error)) from error
        for name, weight in weights.items():
            stored = stored_tensor(self.host, name)
            # A bias that the layer does not have yet, a tied weight and a weight of another shape need a new parameter.
            if stored is None or self.parameters[name] in tied or stored.shape != weight.shape:
                self.stack.merged[name] = stored
                dtype = _dtype(self.host) if stored is None else stored.dtype
                weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
            else:
                self.stack.merged[name] = stored.detach().clone()
            _set(self.host, name, weight)
        self.stack.refresh()


def _tied(shared: Mapping[str, list[str]], plans: Iterable[_MergePlan]) -> dict[str, list[str]]:
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
        if any(_changed_tensors(part) is None for part in adapter.components()):
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
    touched = {n: [_changed_tensors(part) for part in parts] for n, parts in before.items()}
    own = set().union(*(_changed_tensors(part) or () for part in mine))
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


def _changed_tensors(adapter: Adapter) -> set[str] | None:
    """Return the names of the host's tensors that an adapter changes; None if it does not change weights."""
    return set(adapter.changes()) or None


def _merged_weights(host_name: str, host: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    stack = cast(AdapterStack, host.adapters)
    weights = merged_values(host, [part for name in names for part in cast(Adapter, stack[name]).components()])
    rounded: dict[str, torch.Tensor] = {}
    for parameter, weight in weights.items():
        current = stored_tensor(host, parameter)
        if (parameter == "weight" or current is None) and is_packed(host):
            rounded[parameter] = weight.detach()  # rounded when the plain layer is made
        else:
            rounded[parameter] = weight.detach().to(_dtype(host) if current is None else current.dtype)
        if not is_finite(rounded[parameter]):
            raise MergeError(f"{host_name}.{parameter} would hold NaN or infinity after the merge")
    return rounded


def _dtype(host: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in host.named_parameters() if not is_adapter_key(name))


def _set(host: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Write a parameter or buffer in place; an ``nn.Parameter`` replaces the existing one, and None removes it."""
    path, _, last = name.rpartition(".")
    owner = host.get_submodule(path)
    if value is None or isinstance(value, nn.Parameter):
        before = owner._parameters[last]
        setattr(owner, last, value)  # through setattr, with which a recurrent layer updates its own list of parameters
        for width in ("out_features", "out_channels", "num_embeddings"):
            if before is not None and value is not None and getattr(owner, width, None) == len(before):
                setattr(owner, width, len(value))
    else:
        cast(torch.Tensor, stored_tensor(owner, last)).copy_(value)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the weights that :func:`merge` replaced, bit for bit; the adapters run unmerged again."""
    # In reverse order, because for a shared tensor only the host that was merged first kept the original value.
    for _, host in reversed([*hosts(model)]):
        _restore(host)
    restore_marks(model)


def _restore(host: nn.Module) -> None:
    stack = cast(AdapterStack, host.adapters)
    if stack.packed is not None:
        make_packed(host, *stack.packed)
    else:
        for parameter, weight in (stack.merged or {}).items():
            _set(host, parameter, weight)
        refresh(host)
    stack.merged, stack.merged_names, stack.packed = None, (), None
    stack.refresh()
