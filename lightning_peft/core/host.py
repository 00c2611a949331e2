"""How a module carries adapters: its class is swapped for one whose forward runs them around the original.

The adapters live in ``module.adapters``, so new keys read ``<module>.adapters.<name>.<parameter>`` and no base key
changes. Several adapters run in the order they were put in. An adapter with a path of its own on activations
is called around the original forward; one that needs the adapted weight makes the original forward see that
weight while it runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, WeightAdapter
from lightning_peft.core.effective import as_attributes, effective_weights, run_in_place, stored_tensor
from lightning_peft.core.later_forward import set_forward
from lightning_peft.core.reads import computing, forward_values, refused, run_with_values
from lightning_peft.core.swap import add_mixin, check_mixin, has_mixin, original_class, remove_mixin

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
        active: names of the adapters that take part.
        disabled: whether none does, for the time being.
        merged: original weights and biases by name while adapters are folded into them; None otherwise.
        merged_names: the adapters that are folded in.
        skipped: the adapters that are left out here, whatever is active.
        router: what chooses the adapters for each row of the batch; None where all rows have the active ones.
        place: where the router finds the rows.
        changed: names of the host's parameters and buffers that some of the adapters change.
        attributes: the host's attributes that these are read from.
        named: the adapters that rows of some batch have named so far; None where none was ever routed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.merged: dict[str, Tensor | None] | None = None
        self.merged_names: tuple[str, ...] = ()
        self.skipped: tuple[str, ...] = ()
        self.router: Any = None
        self.place: Any = None
        self.named: set[str] | None = None
        self.refresh()

    def forward(self, x: Any) -> Any:
        """``x`` itself: a host that is a ``Sequential`` runs its adapters as one of its layers."""
        return x

    def refresh(self) -> None:
        """Work out what runs, after the names, ``active``, ``disabled`` or ``merged`` have changed."""
        self._folded, self._around = self._parts(() if self.disabled else self.active)
        parts = [part for adapter in self.values() for part in cast(Adapter, adapter).parts()]
        weights = {part.parameter for part in parts if isinstance(part, WeightAdapter)}
        self.changed = frozenset(weights.union(*(part.changes() for part in parts)))
        self.attributes = frozenset(name.partition(".")[0] for name in self.changed)

    def _parts(self, names: Iterable[str]) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
        left = tuple(n for n in self if n in names and n not in self.merged_names and n not in self.skipped)
        running = tuple(part for n in left for part in cast(Adapter, self[n]).parts())
        # Everything up to the last adapter that rewrites the weight is folded into it, to keep the order.
        split = max((i for i, adapter in enumerate(running, 1) if adapter.rewrites), default=0)
        return running[:split], running[split:]

    def running(self, before: Adapter | None = None) -> tuple[Adapter, ...]:
        """The adapters that run, in order; only those ahead of ``before`` where it is given."""
        running = (*self._folded, *self._around)
        return running if before is None else running[: next(i for i, a in enumerate(running) if a is before)]

    def run(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's output; ``forward`` is the original one."""
        if self.router is not None and not self.disabled:
            return self.router.run(host, forward, args, kwargs)
        return self.run_active(host, forward, args, kwargs)

    def run_as(self, names: Iterable[str], host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's output with the adapters called ``names``, whatever is active."""
        before = self._folded, self._around
        self._folded, self._around = self._parts(names)
        try:
            return self.run_active(host, forward, args, kwargs)
        finally:
            self._folded, self._around = before

    def run_active(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's output with the active adapters for all rows."""
        call = forward
        if self._folded:
            call = functools.partial(run_in_place, host, effective_weights(host, self._folded), forward)
        for adapter in self._around:
            call = functools.partial(adapter.run, host, call)
        return call(*args, **kwargs)

    def values_to_read(self, host: nn.Module, name: str) -> dict[str, Any]:
        """The adapted values behind the host's attribute ``name``, for code outside of its forward; may be empty."""
        running, rows_differ = self.running(), False
        if self.router is not None and not self.disabled:
            names = self.router.names_to_read(host)
            running, rows_differ = sum(self._parts(names or ()), ()), names is None
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
        return {**self.__dict__, "router": None}  # a copy is not inside the context


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
    """Within the context only the adapters called ``names`` take part."""
    before = [(stack, stack.active) for stack in stacks(model).values()]
    set_active(model, *names)
    try:
        yield
    finally:
        for stack, names_before in before:
            stack.active = tuple(n for n in names_before if n in stack)  # without what was deleted meanwhile
            stack.refresh()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context no adapter takes part: the model computes what its base computes.

    Raises:
        ValueError: adapters are merged into the base, so that it cannot be had without them.
    """
    check_unmerged(model)
    before = [(stack, stack.disabled) for stack in stacks(model).values()]
    for stack, _ in before:
        stack.disabled = True
        stack.refresh()
    try:
        yield
    finally:
        for stack, was in before:
            stack.disabled = was
            stack.refresh()


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
