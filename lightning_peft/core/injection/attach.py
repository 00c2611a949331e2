"""Attach an adapter to a module and detach it again."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.stack import _TENSOR_PARALLEL, Adapted, AdapterStack
from lightning_peft.core.class_swap import add_mixin, check_mixin, has_mixin, original_class, remove_mixin
from lightning_peft.core.names import parents

__all__ = ["attach", "check_host", "detach"]


def attach(model: nn.Module, host_name: str, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` under ``name`` into the module called ``host_name``, after those already there.

    Copies of parameters go with the adapter of that name where there is one, and come ahead of it.

    Raises:
        ValueError: see :func:`check_host`.
    """
    check_host(model, host_name, name, overrides=bool(adapter.overrides()))
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


def check_host(model: nn.Module, host_name: str, name: str, overrides: bool = False) -> None:
    """Whether the module called ``host_name`` can take an adapter called ``name``, or ``overrides`` that go with it.

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
        if overrides and not any(part.overrides() for part in cast(Adapter, stack[name]).components()):
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
        for parent in [model.get_submodule(name) for name in parents(host_name)]:
            if "_before_slow_path" in vars(parent) and next(hosts(parent), None) is None:
                vars(parent).update(vars(parent).pop("_before_slow_path"))


def _slow_path(module: nn.Module, args: Any) -> None:
    """A hook that does nothing. Its presence keeps ``nn.TransformerEncoderLayer`` from its inference fast path,
    which reads the weights of its children without calling them."""


def _keep_slow_paths(model: nn.Module, host_name: str, host: nn.Module) -> None:
    around = [model.get_submodule(name) for name in parents(host_name)]
    if any(isinstance(p, nn.TransformerEncoderLayer) for p in around):
        host.register_forward_pre_hook(_slow_path)
    for parent in around:
        if isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            vars(parent)["_before_slow_path"] = {"use_nested_tensor": True}
            parent.use_nested_tensor = False  # only the fast path can take the nested tensors it would make
