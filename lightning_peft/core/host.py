"""How a module carries adapters: its class is swapped for one whose forward runs them around the original.

The adapters live in ``module.adapters``, so new keys read ``<module>.adapters.<name>.<parameter>`` and no base key
changes. Several adapters run in the order they were put in. An adapter with a path of its own on activations
is called around the original forward; one that needs the adapted weight makes the original forward see that
weight while it runs.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, WeightAdapter
from lightning_peft.core.effective import as_attributes, effective_weights, run_in_place, stored_tensor
from lightning_peft.core.later_forward import set_forward
from lightning_peft.core.reads import computing, forward_values, refused, run_with_values
from lightning_peft.core.swap import add_mixin, check_mixin, has_mixin, original_class, remove_mixin
from lightning_peft.core.switches import Switches, current, remember, switched

__all__ = [
    "Adapted",
    "AdapterStack",
    "active",
    "active_names",
    "adapter_names",
    "attach",
    "check_host",
    "check_known",
    "check_name",
    "check_unmerged",
    "deactivate",
    "detach",
    "disabled",
    "hosts",
    "set_active",
    "stack_prefixes",
    "stacks",
]


_TENSOR_PARALLEL = (
    "Tensor parallelism splits a layer's weight and inputs, and an adapter needs them whole: leave adapted layers out "
    "of the plan of parallelize_module, or exclude the layers of that plan from targets; FSDP2 works with every method"
)


class AdapterStack(nn.ModuleDict):
    """The adapters of one module, in order of application, and which of them run.

    Attributes:
        shared: which adapters run, for all threads that are in no context of their own.
        open: the switches of contexts that some thread is in.
        local: those of this thread, for compiled code.
        merged: original weights and biases by name while adapters are folded into them; None otherwise.
        merged_names: the adapters that are folded in.
        changed: names of the host's parameters and buffers that some of the adapters change.
        attributes: the host's attributes that these are read from.
        named: the adapters that rows of some batch have named so far; None where none was ever routed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared = Switches()
        self.open: list[Switches] = []
        self.local = threading.local()
        self.merged: dict[str, Tensor | None] | None = None
        self.merged_names: tuple[str, ...] = ()
        self.named: set[str] | None = None
        self.refresh()

    def forward(self, x: Any) -> Any:
        """``x`` itself: a host that is a ``Sequential`` runs its adapters as one of its layers."""
        return x

    def refresh(self) -> None:
        """Work out what runs, after the names, ``active``, ``disabled`` or ``merged`` have changed."""
        for switches in (self.shared, *self.open):
            self.work_out(switches)
        parts = [part for adapter in self.values() for part in cast(Adapter, adapter).parts()]
        weights = {part.parameter for part in parts if isinstance(part, WeightAdapter)}
        self.changed = frozenset(weights.union(*(part.changes() for part in parts)))
        self.attributes = frozenset(name.partition(".")[0] for name in self.changed)

    def work_out(self, switches: Switches) -> None:
        """Work out what runs with ``switches``."""
        names = () if switches.disabled else switches.active
        switches.folded, switches.around = self._parts(names, switches.skipped)

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
    def router(self) -> Any:
        """What chooses the adapters for each row of the batch; None where all rows have the active ones."""
        return current(self).router

    @property
    def place(self) -> Any:
        """Where the router finds the rows."""
        return current(self).place

    def _parts(self, names: Iterable[str], skipped: tuple[str, ...]) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
        left = tuple(n for n in self if n in names and n not in self.merged_names and n not in skipped)
        running = tuple(part for n in left for part in cast(Adapter, self[n]).parts())
        # Everything up to the last adapter that rewrites the weight is folded into it, to keep the order.
        split = max((i for i, adapter in enumerate(running, 1) if adapter.rewrites), default=0)
        return running[:split], running[split:]

    def running(self, before: Adapter | None = None) -> tuple[Adapter, ...]:
        """The adapters that run, in order; only those ahead of ``before`` where it is given."""
        switches = current(self)
        running = (*switches.folded, *switches.around)
        return running if before is None else running[: next(i for i, a in enumerate(running) if a is before)]

    def run(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's output; ``forward`` is the original one."""
        switches = current(self)
        remember(self, switches)
        if switches.router is not None and not switches.disabled:
            return switches.router.run(host, forward, args, kwargs)
        return self.run_active(host, forward, args, kwargs)

    def run_as(self, names: Iterable[str], host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's output with the adapters called ``names``, whatever is active."""
        switches = current(self)
        if switches is self.shared:
            with switched({self: {}}):
                return self.run_as(names, host, forward, args, kwargs)
        before = switches.folded, switches.around
        switches.folded, switches.around = self._parts(names, switches.skipped)
        try:
            return self.run_active(host, forward, args, kwargs)
        finally:
            switches.folded, switches.around = before

    def run_active(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's output with the active adapters for all rows."""
        switches, call = current(self), forward
        if switches.folded:
            call = functools.partial(run_in_place, host, effective_weights(host, switches.folded), forward)
        for adapter in switches.around:
            call = functools.partial(adapter.run, host, call)
        return call(*args, **kwargs)

    def values_to_read(self, host: nn.Module, name: str) -> dict[str, Any]:
        """The adapted values behind the host's attribute ``name``, for code outside of its forward; may be empty."""
        running, rows_differ = self.running(), False
        if self.router is not None and not self.disabled:
            names = self.router.names_to_read(host)
            running, rows_differ = sum(self._parts(names or (), self.skipped), ()), names is None
        problem = next((why for adapter in running if (why := adapter.unreadable()) is not None), None)
        if rows_differ:
            problem = (
                f"{self.place} has different adapters for the rows of the batch, and another module reads its "
                f"{name!r}, one value for all rows. Run the rows of each adapter in a batch of their own"
            )
        if problem is None:
            return as_attributes(host, effective_weights(host, running, only=name))
        stored = {n: stored_tensor(host, n) for n in self.changed if n.partition(".")[0] == name}
        return as_attributes(host, {n: refused(t, problem) for n, t in stored.items() if t is not None})

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # asked for by parallelize_module, which takes every child of a layer for one
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'. {_TENSOR_PARALLEL}")
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has what runs here and now, and is not inside the context of lp.rows.
        shared = current(self).changed(router=None)
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self.adapters.run, self, super().forward)
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


def attach(model: nn.Module, host_name: str, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` under ``name`` into the module called ``host_name``, after those already there.

    Copies of parameters go with the adapter of that name where there is one, and come ahead of it.

    Raises:
        ValueError: see :func:`check_host`.
    """
    check_host(model, host_name, name, copies=bool(adapter.copies()))
    host = model.get_submodule(host_name)
    if not has_mixin(host, Adapted):
        add_mixin(host, Adapted)  # first: it is what can fail
        host.adapters = AdapterStack()
        host.adapters.train(host.training)
        _keep_slow_paths(model, host_name, host)
    stack = cast(AdapterStack, host.adapters)
    adapter.train(host.training)
    if name in stack:
        cast(Any, stack[name]).replacement = adapter
    else:
        stack[name] = adapter
        stack.active = (*stack.active, name)
    stack.refresh()


def check_host(model: nn.Module, host_name: str, name: str, copies: bool = False) -> None:
    """Whether the module called ``host_name`` can take an adapter called ``name``, or ``copies`` that go with it.

    Raises:
        ValueError: the name is taken there, the module has an ``adapters`` of its own, or its class cannot be changed.
    """
    host = model.get_submodule(host_name)
    if not has_mixin(host, Adapted):
        if hasattr(host, "adapters"):
            raise ValueError(
                f"{host_name!r} ({original_class(host).__name__}) has an attribute 'adapters' of its own; "
                "exclude it, or rename that attribute"
            )
        if any(hasattr(p, "placements") for p in host.parameters(recurse=False)):
            raise ValueError(f"{host_name!r} has a weight that is distributed already. {_TENSOR_PARALLEL}")
        check_mixin(host, Adapted, host_name)
    elif name in (stack := cast(AdapterStack, host.adapters)):
        if copies and not any(part.copies() for part in cast(Adapter, stack[name]).parts()):
            return
        raise ValueError(f"{host_name!r} already carries an adapter named {name!r}: give this one another name=")


def detach(model: nn.Module, host_name: str, name: str | None = None) -> None:
    """Take the adapter ``name`` (all of them by default) out of a host; an empty host gets its class back."""
    host = model.get_submodule(host_name)
    stack = cast(AdapterStack, host.adapters)
    for gone in [name] if name is not None else list(stack):
        del stack[gone]
        stack.active = tuple(n for n in stack.active if n != gone)
    stack.refresh()
    if not len(stack):
        remove_mixin(host, Adapted)
        del host.adapters
        for key in [k for k, hook in host._forward_pre_hooks.items() if hook is _slow_path]:
            del host._forward_pre_hooks[key]
        for parent in _parents(model, host_name):
            if "_before_slow_path" in vars(parent) and next(hosts(parent), None) is None:
                vars(parent).update(vars(parent).pop("_before_slow_path"))


def check_name(name: str) -> None:
    """Refuse an adapter name that could not be a part of a key.

    Raises:
        ValueError: it is no word, or an attribute of the container it would be stored in.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name={name!r} cannot name an adapter: use letters, digits, '_' and '-', and no name that "
            "torch.nn.ModuleDict uses itself (such as 'keys' or 'train')"
        )


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` that carry adapters, by qualified name."""
    for name, module in model.named_modules():
        if has_mixin(module, Adapted):
            yield name, module


def stacks(model: nn.Module) -> dict[str, AdapterStack]:
    """The stacks of adapters in ``model``, by the qualified name of the module that carries each."""
    return {name: cast(AdapterStack, host.adapters) for name, host in hosts(model)}


def stack_prefixes(model: nn.Module, name: str | None = None) -> tuple[str, ...]:
    """What the keys of all adapters in ``model``, or of those called ``name``, start with; of each name of a host."""
    inside = "" if name is None else f"{name}."
    named = model.named_modules(remove_duplicate=False)
    return tuple(f"{host}.adapters.{inside}".lstrip(".") for host, module in named if has_mixin(module, Adapted))


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of all adapters in ``model``, in order of application."""
    return tuple(dict.fromkeys(name for stack in stacks(model).values() for name in stack))


def active_names(model: nn.Module) -> set[str]:
    """The names of the adapters that take part somewhere in ``model``."""
    return {name for stack in stacks(model).values() for name in stack.active}


def check_known(model: nn.Module, *names: str) -> None:
    """Refuse a name that no adapter in ``model`` has.

    Raises:
        ValueError: with the names there are.
    """
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter named {name!r}; the model has {list(known)}")


def check_unmerged(model: nn.Module) -> None:
    """Refuse a model that has adapters in its weights.

    Raises:
        ValueError: with the way out.
    """
    if any(stack.merged is not None for stack in stacks(model).values()):
        raise ValueError("adapters are merged into the base: lp.unmerge(model) first")


def set_active(model: nn.Module, *names: str) -> None:
    """Let exactly the adapters called ``names`` take part; what trains does not change.

    Raises:
        ValueError: the model has no adapter of that name, or some that are merged into the base.
    """
    check_known(model, *names)
    check_unmerged(model)
    for stack in stacks(model).values():
        stack.active = tuple(n for n in stack if n in names)
        stack.refresh()


def deactivate(model: nn.Module, name: str) -> None:
    """Let the adapter called ``name`` take no part; the others stay as they are."""
    for stack in stacks(model).values():
        stack.active = tuple(n for n in stack.active if n != name)
        stack.refresh()


@contextmanager
def active(model: nn.Module, *names: str) -> Iterator[None]:
    """Within the context only the adapters called ``names`` take part, for the thread or task that entered it."""
    check_known(model, *names)
    check_unmerged(model)
    with switched({stack: {"active": tuple(n for n in stack if n in names)} for stack in stacks(model).values()}):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context no adapter takes part: the model computes what its base computes, for this thread or task.

    Raises:
        ValueError: adapters are merged into the base, so that it cannot be had without them.
    """
    check_unmerged(model)
    with switched({stack: {"disabled": True} for stack in stacks(model).values()}):
        yield


def _slow_path(module: nn.Module, args: Any) -> None:
    """A hook that does nothing. Its presence keeps ``nn.TransformerEncoderLayer`` from its inference fast path,
    which reads the weights of its children without calling them."""


def _keep_slow_paths(model: nn.Module, host_name: str, host: nn.Module) -> None:
    parents = _parents(model, host_name)
    if any(isinstance(p, nn.TransformerEncoderLayer) for p in parents):
        host.register_forward_pre_hook(_slow_path)
    for parent in parents:
        if isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            vars(parent)["_before_slow_path"] = {"use_nested_tensor": True}
            parent.use_nested_tensor = False  # only the fast path can take the nested tensors it would make


def _parents(model: nn.Module, host_name: str) -> list[nn.Module]:
    parts = host_name.split(".") if host_name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
