"""The stack of adapters on a module, and the class that a module with adapters is swapped to.

Adapters are stored in ``module.adapters``, so their keys are ``<module>.adapters.<name>.<parameter>`` and base keys do
not change. Adapters run in the order in which they were attached. An adapter that works on activations is called
around the original forward. One that modifies the weight makes the original forward read the adapted weight.

What happens in a call::

    host(x)                        nn.Module.__call__, with the hooks of the host
      Adapted.forward              of the swapped class; while it runs, the host's own code reads the stored weights
        AdapterStack.run           looks up the switches of this thread; inside lp.rows, the dispatcher takes over here
          run_active               runs the active adapters for all rows:
            wrapping adapters      adapter.run(host, call), the first attached innermost
              run_in_place         only if some adapter modifies the weight: the host reads effective_weights(...)
                forward            the forward of the host's original class
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter, WeightAdapter
from lightning_peft.core.adapters.effective_weights import (
    as_attributes,
    effective_weights,
    lost_input,
    run_dequantized,
    run_in_place,
)
from lightning_peft.core.adapters.reads import (
    AttributeOfCall,
    computing,
    forward_values,
    run_with_values,
    unreadable_tensor,
)
from lightning_peft.core.adapters.replaced_forward import set_forward
from lightning_peft.core.adapters.switches import Switches, current, remember_switches, switched
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import reserve
from lightning_peft.core.sharded_tensors import distributed_like, is_sharded
from lightning_peft.core.targeting.base_modules import AdapterContainer
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.core.targeting.packed import is_packed

__all__ = ["Adapted", "AdapterStack"]

T = TypeVar("T")

_TENSOR_PARALLEL = (
    "parallelize_module splits every parameter inside a layer in one way, which is wrong for those of its adapters. "
    "Call parallelize_module first, in configure_model, and if you call lp.apply(self), call it after that"
)


class AdapterStack(AdapterContainer):
    """The adapters of one module, in order of application, and the state that decides which of them run.

    Attributes:
        shared: the switches for threads that have not entered a context (``lp.active``, ``lp.rows``, ...).
        open: the switches of contexts that any thread is inside.
        local: the switches of this thread's contexts, for compiled code.
        merged: original weights and biases by name while adapters are merged into them; None otherwise.
        merged_names: the adapters that are merged.
        packed: the host's original class and attributes, if merging replaced its packed weight by a plain one; else
            None.
        changed: names of the host's parameters and buffers that any of the adapters changes.
        attributes: the names of the host's attributes through which these are read.
        ever_routed: the adapters used by rows of any batch so far; None if no batch was routed by row.
        row_plans: how the host served recent combinations of rows; valid while the adapters stay the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared = Switches()
        self.open: list[Switches] = []
        self.local = threading.local()
        self.merged: dict[str, Tensor | None] | None = None
        self.merged_names: tuple[str, ...] = ()
        self.changed: frozenset[str] = frozenset()
        self.attributes: frozenset[str] = frozenset()
        self.packed: tuple[type, dict[str, Any]] | None = None
        self.ever_routed: set[str] | None = None
        self._changes: dict[str, frozenset[str]] = {}  # what each adapter changes, by name
        self.row_plans: dict[Any, Any] = {}
        self._order: dict[str, int] | None = None  # the position of each name; None if it must be computed again
        self.refresh()

    def forward(self, x: T) -> T:
        """Return ``x``: a ``Sequential`` runs every child, including this one, as one of its layers."""
        return x

    def attach_adapter(self, name: str, adapter: Adapter) -> None:
        """Add ``adapter`` after the others, active.

        If there is already an adapter of that name, ``adapter`` becomes its parameter overrides.
        """
        if name in self._modules:
            cast(Any, self._modules[name]).replacement = adapter
            self.refresh()
        else:
            self[name] = adapter
            self._order = None
            switches, parts = current(self), adapter.components()
            switches.active = (*switches.active, name)
            if any(part.modifies_weight for part in parts):
                self.work_out(switches)
            elif not switches.disabled and name not in switches.skipped:  # runs around those that already run
                switches.wrapping_adapters = (*switches.wrapping_adapters, *parts)
        self._update_changes(name)

    def detach_adapter(self, name: str) -> None:
        """Remove the adapter ``name``."""
        adapter = cast(Adapter, self._modules[name])
        self.deactivate_adapter(name)
        del self[name]
        self._order = None
        self._update_changes(name)
        for switches in (self.shared, *self.open):
            self._stop(adapter, switches)

    def deactivate_adapter(self, name: str) -> None:
        """Deactivate the adapter ``name``."""
        switches = current(self)
        switches.active = tuple([other for other in switches.active if other != name])
        if name in self._modules:
            self._stop(cast(Adapter, self._modules[name]), switches)

    def _stop(self, adapter: Adapter, switches: Switches) -> None:
        """Update what runs with ``switches`` after ``adapter`` was deactivated there."""
        parts = adapter.components()
        if any(part.modifies_weight for part in parts):
            self.work_out(switches)  # the adapters before it may run around the host now
            return
        switches.weight_adapters = tuple([part for part in switches.weight_adapters if part not in parts])
        switches.wrapping_adapters = tuple([part for part in switches.wrapping_adapters if part not in parts])

    def names_in_order(self, names: Collection[str]) -> tuple[str, ...]:
        """Return those of ``names`` that the stack has, in order of application."""
        known = [name for name in dict.fromkeys(names) if name in self._modules]
        if len(known) > 1:
            if self._order is None:
                self._order = dict(zip(self._modules, range(len(self._modules))))
            known.sort(key=self._order.__getitem__)
        return tuple(known)

    def refresh(self) -> None:
        """Recompute what runs, after the order, ``active``, ``disabled`` or ``merged`` have changed."""
        self._order = None
        for switches in (self.shared, *self.open):
            self.work_out(switches)

    def _update_changes(self, name: str) -> None:
        """Recompute which values of the host change, after the adapter ``name`` was added or removed."""
        self.row_plans.clear()
        self._changes.pop(name, None)
        if name in self._modules:
            parts = cast(Adapter, self._modules[name]).components()
            weights = {part.parameter for part in parts if isinstance(part, WeightAdapter)}
            self._changes[name] = frozenset(weights.union(*(part.changes() for part in parts)))
        self.changed = frozenset().union(*set(self._changes.values()))
        self.attributes = frozenset(changed.partition(".")[0] for changed in self.changed)

    def work_out(self, switches: Switches) -> None:
        """Compute which adapters run with ``switches``, and store them there."""
        names = () if switches.disabled else switches.active
        switches.weight_adapters, switches.wrapping_adapters = self._parts(names, switches.skipped)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters; inside a context of this thread, those that the context activates."""
        active = current(self).active
        return tuple(n for n in active if n in self._modules)  # an adapter may have been deleted in between

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        current(self).active = names

    @property
    def disabled(self) -> bool:
        """Whether all adapters are temporarily off."""
        return current(self).disabled

    @property
    def skipped(self) -> tuple[str, ...]:
        """The adapters that do not run on this module even if they are active."""
        return current(self).skipped

    @property
    def dispatcher(self) -> Any:
        """The object that selects adapters for each row of the batch; None if all rows use the active adapters."""
        return current(self).dispatcher

    @property
    def batch_layout(self) -> Any:
        """How the host sees the batch, for the dispatcher."""
        return current(self).batch_layout

    def _parts(
        self, names: Collection[str], skipped: tuple[str, ...]
    ) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
        left = tuple(n for n in self.names_in_order(names) if n not in self.merged_names and n not in skipped)
        running = tuple(part for n in left for part in cast(Adapter, self._modules[n]).components())
        # If an adapter modifies the weight, all weight adapters before it must be applied to the weight too: running
        # them around the host would apply them after it and change the result.
        split = max((i for i, adapter in enumerate(running, 1) if adapter.modifies_weight), default=0)
        folded = tuple(adapter for adapter in running[:split] if adapter.changes())
        return folded, tuple(adapter for adapter in running if adapter not in folded) if folded else running

    def running(self, before: Adapter | None = None) -> tuple[Adapter, ...]:
        """Return the adapters that run, in order; only those before ``before`` if it is given."""
        switches = current(self)
        running = (*switches.weight_adapters, *switches.wrapping_adapters)
        return running if before is None else running[: next(i for i, a in enumerate(running) if a is before)]

    def run(self, host: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the host's output with its adapters; ``forward`` is the host's original forward."""
        switches = current(self)
        remember_switches(self, switches)
        if switches.dispatcher is not None and not switches.disabled:
            if any(map(is_sharded, (*args, *kwargs.values()))):
                raise ValueError(
                    f"lp.rows is not supported on a {original_class(host).__name__} whose input is distributed by "
                    "tensor parallelism: it computes with plain tensors. Run one batch for each adapter with lp.active"
                )
            return switches.dispatcher.run(host, forward, args, kwargs)
        return self.run_active(host, forward, args, kwargs)

    def run_as(
        self,
        names: Collection[str],
        host: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the host's output with the adapters ``names`` instead of the active ones."""
        switches = current(self)
        if switches is self.shared:  # other threads use them too, so change a copy that only this thread sees
            with switched({self: {}}):
                return self.run_as(names, host, forward, args, kwargs)
        before = switches.weight_adapters, switches.wrapping_adapters
        switches.weight_adapters, switches.wrapping_adapters = self._parts(names, switches.skipped)
        try:
            return self.run_active(host, forward, args, kwargs)
        finally:
            switches.weight_adapters, switches.wrapping_adapters = before

    def run_active(
        self, host: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the host's output with the active adapters applied to all rows."""
        switches, call = current(self), forward
        if switches.weight_adapters:
            if (problem := lost_input([a for a in switches.weight_adapters if a.training])) is not None:
                raise ValueError(problem)
            if is_packed(host):
                call = functools.partial(run_dequantized, host, switches.weight_adapters)
            else:
                call = functools.partial(run_in_place, host, effective_weights(host, switches.weight_adapters), forward)
        distributed = next(filter(is_sharded, (*args, *kwargs.values())), None)  # inputs in tensor parallelism
        for adapter in switches.wrapping_adapters:  # the first one becomes the innermost call, so it runs first
            run = adapter.run if distributed is None else functools.partial(_run_distributed, distributed, adapter)
            call = functools.partial(run, host, call)
        return call(*args, **kwargs)

    def values_to_read(self, host: nn.Module, name: str) -> dict[str, Any]:
        """Return the adapted values of the host's attribute ``name`` for code outside its forward; may be empty."""
        running, rows_differ = self.running(), False
        if self.dispatcher is not None and not self.disabled:
            names = self.dispatcher.names_to_read(host)
            running, rows_differ = sum(self._parts(names or (), self.skipped), ()), names is None
        problem = next((why for adapter in running if (why := adapter.unreadable()) is not None), None)
        if rows_differ:
            problem = (
                f"{self.batch_layout} has different adapters for the rows of the batch, but another module reads its "
                f"{name!r}, which has one value for all rows. Run one batch for each adapter"
            )
        if problem is None:
            return as_attributes(host, effective_weights(host, running, only=name))
        stored = {n: stored_tensor(host, n) for n in self.changed if n.partition(".")[0] == name}
        return as_attributes(host, {n: unreadable_tensor(t, problem) for n, t in stored.items() if t is not None})

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # parallelize_module reads it, because it treats every child of a layer as a layer
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'. {_TENSOR_PARALLEL}")
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts with the adapters that run now, but outside of any lp.rows context.
        shared = current(self).changed(dispatcher=None)
        self.work_out(shared)
        kept = {k: v for k, v in self.__dict__.items() if k != "local"}
        return {**kept, "shared": shared, "open": [], "row_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.local = threading.local()

    def _replicate_for_data_parallel(self) -> AdapterStack:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.shared, replica.open = current(self), []  # replicas run in threads that do not see this context
        return replica


def _run_distributed(x: Tensor, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
    with distributed_like(x, adapter):
        return adapter.run(*args, **kwargs)


class Adapted(nn.Module):
    """Mixin that is added to the class of a module when it gets adapters."""

    adapters: AdapterStack
    # nn.RNNBase reads its weights from these two lists instead of its parameters.
    _flat_weights = AttributeOfCall()
    _flat_weight_refs = AttributeOfCall()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # self.adapters would go through __getattr__ below, which first looks for an adapted value.
        stack = cast(AdapterStack, self._modules["adapters"])
        run = functools.partial(stack.run, self, super().forward)
        # With no values, the host's own code reads stored parameters: its adapters run around it, and adapted values
        # would apply them a second time. run_in_place sets values for adapters that modify the weight.
        return run_with_values(self, {}, run, (args, kwargs), {})

    def __getattr__(self, name: str) -> Any:
        # Parameters are not instance attributes, so every read of one arrives here.
        values = forward_values(self)
        if values is None and name in _adapted_attributes(self) and computing():
            values = self.adapters.values_to_read(self, name)
        if values is not None and name in values:
            return values[name]
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if "." in name:  # parallelize_module treats parameters of children as the layer's own
            raise ValueError(
                f"{name!r} cannot be registered: the {original_class(self).__name__} carries adapters. "
                f"{_TENSOR_PARALLEL}"
            )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            set_forward(self, value)
        else:
            super().__setattr__(name, value)


def _adapted_attributes(host: nn.Module) -> frozenset[str]:
    stack = host.__dict__.get("_modules", {}).get("adapters")  # a module has no attributes yet while it is unpickled
    return frozenset() if stack is None else stack.attributes


reserve((*dir(AdapterStack), *vars(AdapterStack())))
