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
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter, WeightAdapter
from lightning_peft.core.adapters.effective_weights import (
    as_attributes,
    effective_weights,
    lost_input,
    run_dequantized,
    run_in_place,
    stored_tensor,
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
from lightning_peft.core.targeting.base_modules import AdapterContainer
from lightning_peft.core.targeting.packed import is_packed

__all__ = ["Adapted", "AdapterStack"]

T = TypeVar("T")

_TENSOR_PARALLEL = (
    "Tensor parallelism splits a layer's weight and inputs, but an adapter needs them whole. Leave adapted layers out "
    "of the plan of parallelize_module, or exclude the layers of that plan from targets; FSDP2 works with every method"
)


class AdapterStack(AdapterContainer):
    """The adapters of one module, in order of application, and the state that decides which of them run.

    Attributes:
        shared: the switches for threads that have not entered a context (``lp.active``, ``lp.rows``, ...).
        open: the switches of contexts that any thread is inside.
        local: the switches of this thread's contexts, for compiled code.
        merged: original weights and biases by name while adapters are merged into them; None otherwise.
        merged_names: the adapters that are merged.
        changed: names of the host's parameters and buffers that any of the adapters changes.
        attributes: the names of the host's attributes through which these are read.
        ever_routed: the adapters used by rows of any batch so far; None if no batch was routed by row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared = Switches()
        self.open: list[Switches] = []
        self.local = threading.local()
        self.merged: dict[str, Tensor | None] | None = None
        self.merged_names: tuple[str, ...] = ()
        self.ever_routed: set[str] | None = None
        self.refresh()

    def forward(self, x: T) -> T:
        """Return ``x``: a ``Sequential`` runs every child, including this one, as one of its layers."""
        return x

    def refresh(self) -> None:
        """Recompute what runs, after the names, ``active``, ``disabled`` or ``merged`` have changed."""
        for switches in (self.shared, *self.open):
            self.work_out(switches)
        parts = [part for adapter in self.values() for part in cast(Adapter, adapter).components()]
        weights = {part.parameter for part in parts if isinstance(part, WeightAdapter)}
        self.changed = frozenset(weights.union(*(part.changes() for part in parts)))
        self.attributes = frozenset(name.partition(".")[0] for name in self.changed)

    def work_out(self, switches: Switches) -> None:
        """Compute which adapters run with ``switches``, and store them there."""
        names = () if switches.disabled else switches.active
        switches.weight_adapters, switches.wrapping_adapters = self._parts(names, switches.skipped)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters; inside a context of this thread, those that the context activates."""
        return tuple(n for n in current(self).active if n in self)  # an adapter may have been deleted in between

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

    def _parts(self, names: Iterable[str], skipped: tuple[str, ...]) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
        left = tuple(n for n in self if n in names and n not in self.merged_names and n not in skipped)
        running = tuple(part for n in left for part in cast(Adapter, self[n]).components())
        # If an adapter modifies the weight, all weight adapters before it must be applied to the weight too: running
        # them around the host would apply them after it and change the result.
        split = max((i for i, adapter in enumerate(running, 1) if adapter.modifies_weight), default=0)
        folded = tuple(adapter for adapter in running[:split] if adapter.changes())
        return folded, tuple(adapter for adapter in running if adapter not in folded)

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
            return switches.dispatcher.run(host, forward, args, kwargs)
        return self.run_active(host, forward, args, kwargs)

    def run_as(
        self,
        names: Iterable[str],
        host: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the host's output with the adapters ``names`` instead of the active ones."""
        switches = current(self)
        if switches is self.shared:
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
        for adapter in switches.wrapping_adapters:
            call = functools.partial(adapter.run, host, call)
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
        return {**{k: v for k, v in self.__dict__.items() if k != "local"}, "shared": shared, "open": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.local = threading.local()

    def _replicate_for_data_parallel(self) -> AdapterStack:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.shared, replica.open = current(self), []  # replicas run in threads that do not see this context
        return replica


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
        return run_with_values(self, {}, run, (args, kwargs), {})

    def __getattr__(self, name: str) -> Any:
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
