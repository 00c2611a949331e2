"""How a module carries adapters: its class is swapped for one whose forward runs them around the original.

The adapters live in ``module.adapters``, so new keys read ``<module>.adapters.<name>.<parameter>`` and no base key
changes. Several adapters run in the order in which they were attached. An adapter with a path of its own on
activations is called around the original forward; one that needs the adapted weight makes the original forward see
that weight while it runs.

The way of a call::

    host(x)                        nn.Module.__call__, with the hooks of the host
      Adapted.forward              the swapped class; while it runs, the host's own code reads the stored weights
        AdapterStack.run           looks up the switches of this thread; in lp.rows, their dispatcher goes on from here
          run_active               the active adapters, for all rows:
            adapters around        adapter.run(host, call), the first attached innermost
              run_in_place         only if some adapter modifies the weight: the host reads effective_weights(...)
                forward            that of the host's original class
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

__all__ = ["Adapted", "AdapterStack"]

T = TypeVar("T")

_TENSOR_PARALLEL = (
    "Tensor parallelism splits a layer's weight and inputs, and an adapter needs them whole: leave adapted layers out "
    "of the plan of parallelize_module, or exclude the layers of that plan from targets; FSDP2 works with every method"
)


class AdapterStack(AdapterContainer):
    """The adapters of one module, in order of application, and which of them run.

    Attributes:
        shared: which adapters run, for all threads that are in no context of their own.
        open: the switches of contexts that some thread is in.
        local: those of this thread, for compiled code.
        merged: original weights and biases by name while adapters are folded into them; None otherwise.
        merged_names: the adapters that are folded in.
        changed: names of the host's parameters and buffers that some of the adapters change.
        attributes: the host's attributes that these are read from.
        ever_routed: the adapters that rows of some batch have named so far; None where none was ever routed.
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
        """``x`` itself: a host that is a ``Sequential`` runs its adapters as one of its layers."""
        return x

    def refresh(self) -> None:
        """Work out what runs, after the names, ``active``, ``disabled`` or ``merged`` have changed."""
        for switches in (self.shared, *self.open):
            self.work_out(switches)
        parts = [part for adapter in self.values() for part in cast(Adapter, adapter).components()]
        weights = {part.parameter for part in parts if isinstance(part, WeightAdapter)}
        self.changed = frozenset(weights.union(*(part.changes() for part in parts)))
        self.attributes = frozenset(name.partition(".")[0] for name in self.changed)

    def work_out(self, switches: Switches) -> None:
        """Work out what runs with ``switches``."""
        names = () if switches.disabled else switches.active
        switches.weight_adapters, switches.wrapping_adapters = self._parts(names, switches.skipped)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that take part; in a context of this thread, those of the context."""
        return tuple(n for n in current(self).active if n in self)  # without what was deleted meanwhile

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        current(self).active = names

    @property
    def disabled(self) -> bool:
        """Whether no adapter takes part, for the time being."""
        return current(self).disabled

    @property
    def skipped(self) -> tuple[str, ...]:
        """The adapters that are left out here, whatever is active."""
        return current(self).skipped

    @property
    def dispatcher(self) -> Any:
        """What chooses the adapters for each row of the batch; None where all rows have the active ones."""
        return current(self).dispatcher

    @property
    def batch_layout(self) -> Any:
        """Where the dispatcher finds the rows."""
        return current(self).batch_layout

    def _parts(self, names: Iterable[str], skipped: tuple[str, ...]) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
        left = tuple(n for n in self if n in names and n not in self.merged_names and n not in skipped)
        running = tuple(part for n in left for part in cast(Adapter, self[n]).components())
        # Weight adapters up to the last one that rewrites the weight are folded into it, to keep their order.
        split = max((i for i, adapter in enumerate(running, 1) if adapter.modifies_weight), default=0)
        folded = tuple(adapter for adapter in running[:split] if adapter.changes())
        return folded, tuple(adapter for adapter in running if adapter not in folded)

    def running(self, before: Adapter | None = None) -> tuple[Adapter, ...]:
        """The adapters that run, in order; only those ahead of ``before`` where it is given."""
        switches = current(self)
        running = (*switches.weight_adapters, *switches.wrapping_adapters)
        return running if before is None else running[: next(i for i, a in enumerate(running) if a is before)]

    def run(self, host: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's output; ``forward`` is the original one."""
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
        """The host's output with the adapters called ``names``, whatever is active."""
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
        """The host's output with the active adapters for all rows."""
        switches, call = current(self), forward
        if switches.weight_adapters:
            if (problem := lost_input([a for a in switches.weight_adapters if a.training])) is not None:
                raise ValueError(problem)
            call = functools.partial(run_in_place, host, effective_weights(host, switches.weight_adapters), forward)
        for adapter in switches.wrapping_adapters:
            call = functools.partial(adapter.run, host, call)
        return call(*args, **kwargs)

    def values_to_read(self, host: nn.Module, name: str) -> dict[str, Any]:
        """The adapted values behind the host's attribute ``name``, for code outside of its forward; may be empty."""
        running, rows_differ = self.running(), False
        if self.dispatcher is not None and not self.disabled:
            names = self.dispatcher.names_to_read(host)
            running, rows_differ = sum(self._parts(names or (), self.skipped), ()), names is None
        problem = next((why for adapter in running if (why := adapter.unreadable()) is not None), None)
        if rows_differ:
            problem = (
                f"{self.batch_layout} has different adapters for the rows of the batch, and another module reads its "
                f"{name!r}, one value for all rows. Run the rows of each adapter in a batch of their own"
            )
        if problem is None:
            return as_attributes(host, effective_weights(host, running, only=name))
        stored = {n: stored_tensor(host, n) for n in self.changed if n.partition(".")[0] == name}
        return as_attributes(host, {n: unreadable_tensor(t, problem) for n, t in stored.items() if t is not None})

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # asked for by parallelize_module, which takes every child of a layer for one
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'. {_TENSOR_PARALLEL}")
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has what runs here and now, and is not inside the context of lp.rows.
        shared = current(self).changed(dispatcher=None)
        self.work_out(shared)
        return {**{k: v for k, v in self.__dict__.items() if k != "local"}, "shared": shared, "open": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.local = threading.local()

    def _replicate_for_data_parallel(self) -> AdapterStack:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.shared, replica.open = current(self), []  # it runs in another thread
        return replica


class Adapted(nn.Module):
    """Mixin of a module that carries adapters."""

    adapters: AdapterStack
    # of nn.RNNBase, whose forward reads these in place of its parameters
    _flat_weights = AttributeOfCall()
    _flat_weight_refs = AttributeOfCall()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not by attribute: __getattr__ below would first look for an adapted value.
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
        if "." in name:  # parallelize_module takes parameters of children for the layer's own
            raise ValueError(f"a {original_class(self).__name__} carries adapters: {name!r}. {_TENSOR_PARALLEL}")
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            set_forward(self, value)
        else:
            super().__setattr__(name, value)


def _adapted_attributes(host: nn.Module) -> frozenset[str]:
    stack = host.__dict__.get("_modules", {}).get("adapters")  # nothing is there while the module is being unpickled
    return frozenset() if stack is None else stack.attributes
