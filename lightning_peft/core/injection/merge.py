"""Fold adapters into the base weights, and out again bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.effective_weights import effective_weights, stored_tensor
from lightning_peft.core.adapters.lookup import adapter_names, check_known, hosts, stacks
from lightning_peft.core.adapters.low_rank import LowRankAdapter, add_products
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.class_swap import restore_class
from lightning_peft.core.injection.attach import detach
from lightning_peft.core.injection.low_rank_factors import evaluating
from lightning_peft.core.names import canonical, join
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.state.consistency import check_record
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.layouts import WeightLayout
from lightning_peft.core.targeting.ties import tied_names
from lightning_peft.ops.finite import is_finite

__all__ = ["MergeError", "merge", "unload", "unmerge"]


class MergeError(ValueError):
    """Adapters that cannot be folded into the base, and why. Nothing was changed."""


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None, partial: bool = False, untie: bool = False) -> list[str]:
    """Fold the active adapters, or the one called ``name``, into the base weights.

    Computed in float32, as in evaluation (no dropout), and rounded once to the weight's type, one module after the
    other. The originals are kept for :func:`unmerge`.

    Args:
        model: the adapted model; changed in place.
        name: one adapter; by default all that are active.
        partial: fold what can be folded, and let the rest run beside it as before, instead of refusing.
        untie: a weight that other modules share (an embedding tied to the output head) and that changes in one of them
            only gets a tensor of its own there; by default it is refused. Where all of them change alike, it stays
            one tensor. :func:`unmerge` ties it again.

    Returns:
        What was left to run beside the weights, each with its place and the reason; empty unless ``partial``.

    Raises:
        MergeError: an adapter that is no function of a weight, one that would change places with an earlier one where
            that makes a difference, a weight that other modules share, a module that was replaced or resized, a result
            that is not finite, adapters merged already, or none active and none named. The model is then as it was.
            With ``partial``, if nothing can be folded.
        ValueError: no adapter of that name.
    """
    try:
        check_record(model)
    except StateError as error:
        raise MergeError(str(error)) from error
    if name is not None:
        check_known(model, name)
    elif (found := stacks(model)) and not any(stack.active for stack in found.values()):
        raise MergeError(
            f"none of {list(adapter_names(model))} is active: lp.set_active(model, ...) first, or name one"
        )
    plans: list[_MergePlan] = []
    left: dict[str, list[str]] = {}  # why, by adapter
    shared = tied_names(model)
    for host_name, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        if stack.merged is not None:
            raise MergeError(f"{host_name!r} has adapters merged already: lp.unmerge(model) first")
        names, reasons = _mergeable(host_name, host, name)
        try:
            if names:
                plans.append(_MergePlan(host_name, host, names, shared))
        except MergeError as error:
            reasons |= {n: str(error) for n in names}
        for n, reason in reasons.items():
            left.setdefault(n, []).append(reason)
    tied = _tied(shared, plans)
    for plan in plans if not untie else ():
        for full in (full for full in plan.parameters.values() if full in tied):
            reason = f"{full} is the same tensor as {tied[full]}, which would change with it: {_UNTIE}"
            for n in plan.names:
                left.setdefault(n, []).append(reason)
    if not untie:
        plans = [plan for plan in plans if tied.keys().isdisjoint(plan.parameters.values())]
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
    except BaseException:
        unmerge(model)
        raise
    return _reasons(left)


def _refuse(left: Mapping[str, list[str]], partial: bool, plans: Collection[_MergePlan]) -> None:
    if left and not (partial and plans):
        also = " (lp.merge(model, partial=True) folds all else)" if plans else ""
        raise MergeError(f"{'; '.join(_reasons(left))}{also}")


_UNTIE = "lp.merge(model, untie=True) gives it a tensor of its own"


class _MergePlan:
    """What is to be written at one host: the change of the adapters called ``names``, in order.

    Attributes:
        parameters: the full name of each tensor that changes, by its name in the host.

    Raises:
        MergeError: a weight that others share would not be finite.
    """

    def __init__(self, host_name: str, host: nn.Module, names: tuple[str, ...], shared: Mapping[str, Any]) -> None:
        self.host_name, self.host, self.names = host_name, host, names
        self.stack = cast(AdapterStack, host.adapters)
        parts = [part for name in names for part in cast(Adapter, self.stack[name]).components()]
        touched = sorted({p for part in parts for p in _changed_tensors(part) or ()})
        self.parameters = {p: join(host_name, p) for p in touched}
        # What others share is computed ahead: it must change alike everywhere, and from one and the same value.
        self._weights = None if shared.keys().isdisjoint(self.parameters.values()) else self._compute()

    def weights(self) -> dict[str, torch.Tensor]:
        """The new values by name in the host."""
        return self._compute() if self._weights is None else self._weights

    def _compute(self) -> dict[str, torch.Tensor]:
        return _merged_weights(self.host_name, self.host, self.names)

    def write(self, tied: Mapping[str, Any]) -> None:
        """Write the new values in place, and keep copies of the old; a parameter of ``tied`` is replaced and kept.

        Raises:
            MergeError: a value is not finite; nothing was changed.
        """
        weights = self.weights()
        self.stack.merged, self.stack.merged_names = {}, self.names
        for name, weight in weights.items():
            stored = stored_tensor(self.host, name)
            if stored is None or self.parameters[name] in tied or stored.shape != weight.shape:
                self.stack.merged[name] = stored
                dtype = _dtype(self.host) if stored is None else stored.dtype
                weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
            else:
                self.stack.merged[name] = stored.detach().clone()
            _set(self.host, name, weight)
        self.stack.refresh()


def _tied(shared: Mapping[str, list[str]], plans: Iterable[_MergePlan]) -> dict[str, list[str]]:
    """What cannot be written in place: the other names of a tensor that does not change alike under all of them."""
    new = {full: plan.weights().get(p) for plan in plans for p, full in plan.parameters.items() if full in shared}
    found: dict[str, list[str]] = {}
    for name in new:
        values = [new.get(other) for other in shared[name]]
        first = values[0]
        if first is None or any(value is None or not torch.equal(first, value) for value in values):
            found[name] = [other for other in shared[name] if other != name]
    return found


def _mergeable(host_name: str, host: nn.Module, name: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names at one host that can be folded, in order, and why each of the others cannot."""
    stack = cast(AdapterStack, host.adapters)
    names: tuple[str, ...] = ()
    reasons: dict[str, str] = {}
    for n in stack.active if name is None else [n for n in stack if n == name]:
        adapter = cast(Adapter, stack[n])
        where = f"{n!r} at {host_name!r} ({type(adapter).__name__})"
        if adapter.is_passthrough:
            continue
        if any(_changed_tensors(part) is None for part in adapter.components()):
            reasons[n] = f"{where} is no weight change"
        elif reasons:
            reasons[n] = f"{where} runs after {next(iter(reasons))!r}, and folded in it would run before it"
        elif name is not None and (reason := _order_problem(host_name, host, name)):
            reasons[n] = reason
        else:
            names += (n,)
    return names, reasons


def _reasons(left: Mapping[str, list[str]]) -> list[str]:
    """One sentence for each adapter, whatever the number of its places."""

    def more(n: int) -> str:
        return f", and so at {n} more place{'s' if n > 1 else ''}" if n else ""

    return [reasons[0] + more(len(reasons) - 1) for reasons in left.values()]


def _order_problem(host_name: str, host: nn.Module, name: str) -> str | None:
    """Merged alone, an adapter comes ahead of those that ran before it: why it may not, unless that is the same."""
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
        f"{name!r} at {host_name!r} runs after {meets[0]!r}, and merged alone it would run before it, which does not "
        f"compute the same: merge both, or let {name!r} alone be active"
    )
    if any(t is None for n in meets for t in touched[n]):
        return reason
    others = [part for parts in before.values() for part in parts]
    try:
        now, then = (_effective(host_name, host, parts) for parts in ([*others, *mine], [*mine, *others]))
    except MergeError as error:
        return str(error)
    return None if all(_equal(now[p], then[p]) for p in now) else reason


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results differ by no more than the order of their sums does."""
    if a.shape != b.shape:
        return False
    eps = torch.finfo(a.dtype if a.is_floating_point() else torch.float32).eps
    return bool((a - b).abs().max() <= 64 * eps * a.abs().max())


def _changed_tensors(adapter: Adapter) -> set[str] | None:
    """The host's own tensors that an adapter is a function of and changes; None where it is no weight change."""
    return set(adapter.changes()) or None


def _merged_weights(host_name: str, host: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    stack = cast(AdapterStack, host.adapters)
    weights = _effective(host_name, host, [part for name in names for part in cast(Adapter, stack[name]).components()])
    rounded: dict[str, torch.Tensor] = {}
    for parameter, weight in weights.items():
        current = stored_tensor(host, parameter)
        rounded[parameter] = weight.detach().to(_dtype(host) if current is None else current.dtype)
        if not is_finite(rounded[parameter]):
            raise MergeError(f"{host_name}.{parameter} would hold NaN or infinity after the merge")
    return rounded


def _effective(host_name: str, host: nn.Module, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """The host's weights after ``adapters`` in order, as in evaluation and before they are rounded to their type.

    Raises:
        MergeError: a weight is quantised.
    """
    stored = {p: stored_tensor(host, p) for a in adapters for p in (*a.overrides(), *a.weights())}
    for parameter in (p for adapter in adapters for p in adapter.weights()):
        dtype = cast(torch.Tensor, stored[parameter]).dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            full = join(host_name, parameter)
            raise MergeError(f"{full} is stored as {dtype}: a quantised weight cannot take an exact change")
    dtype = torch.float32
    for tensor in stored.values():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            dtype = torch.promote_types(dtype, tensor.dtype)
    with evaluating(*adapters):
        return _plain_sums(host, adapters, dtype) or effective_weights(host, adapters, dtype)


def _plain_sums(host: nn.Module, adapters: Iterable[Adapter], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The new weights, rounded, where all that ``adapters`` do is to add low-rank products; empty where it is not."""
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    layouts: dict[str, WeightLayout] = {}
    for adapter in adapters:
        if adapter.overrides():
            return {}
        for parameter, part in adapter.weights().items():
            pair = part.low_rank() if isinstance(part, LowRankAdapter) and not part.changes_bias else None
            if pair is None:
                return {}
            pairs.setdefault(parameter, []).append(pair)
            layouts[parameter] = part.layout
    stored = {p: cast(torch.Tensor, stored_tensor(host, p)).detach() for p in pairs}
    return {p: layouts[p].stored(add_products(layouts[p].matrix(stored[p]), pairs[p], dtype), stored[p]) for p in pairs}


def _dtype(host: nn.Module) -> torch.dtype:
    return next(p.dtype for p in host.parameters(recurse=False))


def _set(host: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Write a parameter or buffer in place; a ``nn.Parameter`` takes the place of the one there, None takes it away."""
    path, _, last = name.rpartition(".")
    owner = host.get_submodule(path)
    if value is None or isinstance(value, nn.Parameter):
        before = owner._parameters[last]
        setattr(owner, last, value)  # a recurrent layer keeps a list of its parameters in step
        for width in ("out_features", "out_channels", "num_embeddings"):
            if before is not None and value is not None and getattr(owner, width, None) == len(before):
                setattr(owner, width, len(value))
    else:
        cast(torch.Tensor, stored_tensor(owner, last)).copy_(value)


_merge = merge  # ``unload`` has an argument of the same name


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the weights that :func:`merge` replaced, bit for bit; the adapters run beside them again."""
    for _, host in reversed([*hosts(model)]):  # of a tensor that several share the first has kept the original
        stack = cast(AdapterStack, host.adapters)
        for parameter, weight in (stack.merged or {}).items():
            _set(host, parameter, weight)
        stack.merged, stack.merged_names = None, ()
        stack.refresh()


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Give the plain model back: original classes, original keys, gradients required where they were before.

    Args:
        model: the adapted model; changed in place and returned.
        merge: fold the active adapters into the weights first; otherwise the base is as it was.

    Raises:
        MergeError: ``merge=True`` and an active adapter cannot be folded, or was left out of an earlier merge.
    """
    found = stacks(model).values()
    if merge and not any(stack.merged for stack in found):
        try:
            _merge(model)
        except MergeError as error:
            raise MergeError(
                f"{error}; to unload without it, first lp.set_active(model, ...) what is to stay"
            ) from None
    elif merge:
        beside = {n for stack in found for n, a in stack.items() if a in stack.running() and not a.is_passthrough}
        if beside:
            raise MergeError(
                f"{sorted(beside)} are not merged but run beside the weights, and would be lost: lp.unmerge(model), "
                "lp.set_active(model, ...) what is to stay, and unload again"
            )
    if not merge:
        unmerge(model)
    record, injected = injection_state(model), injected_module(model)
    for name, _ in list(hosts(model)):
        detach(model, name)
    for module in model.modules():
        restore_class(module)
        module.__dict__.pop("_peft_injection", None)
        module.__dict__.pop("_hold_statistics", None)
        module.__dict__.pop("_peft_rows_stack", None)
        if (dtype := module.__dict__.pop("_compute_dtype", None)) is not None:
            module.to(dtype)
        if (mode := module.__dict__.pop("_mode_asked", None)) is not None:
            module.train(mode)
    if record is not None:
        for name, parameter in injected.named_parameters():
            parameter.requires_grad_(canonical(name) in record.trained_before)
    return model
