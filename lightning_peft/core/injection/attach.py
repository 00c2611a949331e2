"""Attach an adapter to a module, and detach it."""

from __future__ import annotations

from typing import cast

from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.reads import ComputedReads, computed_reads
from lightning_peft.core.adapters.stack import Adapted, AdapterStack
from lightning_peft.core.class_swap import add_mixin, check_mixin, has_mixin, is_swapped, original_class, remove_mixin
from lightning_peft.core.names import parents
from lightning_peft.core.state.freezing import FrozenNorm
from lightning_peft.core.targeting.computed_weights import computed_names, refresh

__all__ = ["attach", "check_detachable", "check_host", "detach"]


def attach(model: nn.Module, host_name: str, name: str, adapter: Adapter) -> None:
    """Attach ``adapter`` under ``name`` to the module ``host_name``, after the adapters it already has.

    Parameter overrides join the existing adapter of that name, if there is one, and run before it.

    Raises:
        ValueError: if :func:`check_host` raises it.
    """
    check_host(model, host_name, name, overrides=bool(adapter.overrides()))
    host = model.get_submodule(host_name)
    if not has_mixin(host, Adapted):
        if names := computed_names(host):
            add_mixin(
                host, computed_reads(tuple(names))
            )  # added before Adapted, so that Adapted's reads of these names take precedence
            refresh(host)  # the parameters behind the weight are frozen now
        add_mixin(host, Adapted)  # the only step that can fail comes first
        stack = AdapterStack().train(bool(host._mode_asked) if has_mixin(host, FrozenNorm) else host.training)
        nn.Module.__setattr__(host, "adapters", stack)  # a class may refuse unknown attributes in its own
        _keep_slow_paths(model, host_name, host)
    stack = cast(AdapterStack, host.adapters)
    adapter.train(stack.training)
    stack.attach_adapter(name, adapter)


def check_host(model: nn.Module, host_name: str, name: str, overrides: bool = False) -> None:
    """Check that the module ``host_name`` can take an adapter called ``name``, or parameter ``overrides`` for it.

    Raises:
        ValueError: if the name is taken, the module already has an attribute ``adapters``, or its class cannot be
            swapped.
    """
    host = model.get_submodule(host_name)
    if not has_mixin(host, Adapted):
        if hasattr(host, "adapters"):
            raise ValueError(
                f"{host_name!r} ({original_class(host).__name__}) already has an attribute 'adapters'; "
                "exclude it, or rename that attribute"
            )
        check_mixin(host, Adapted, host_name)
    elif name in (stack := cast(AdapterStack, host.adapters)):
        if overrides and not any(part.overrides() for part in cast(Adapter, stack[name]).components()):
            return
        raise ValueError(f"{host_name!r} already carries an adapter named {name!r}: give this one another name=")


def check_detachable(model: nn.Module) -> None:
    """Check that every module with adapters can get its original class back.

    Raises:
        ValueError: if a parametrization was registered after the adapters were attached; its class is derived from the
            class of the module with adapters.
    """
    for name, host in hosts(model):
        if "parametrizations" in host._modules and not is_swapped(host):
            raise ValueError(
                f"{name!r} has a parametrization that was registered after its adapters, so its original class cannot "
                "be restored. Remove it first with torch.nn.utils.parametrize.remove_parametrizations"
            )


def detach(model: nn.Module, host_name: str, name: str | None = None) -> None:
    """Detach the adapter ``name`` (by default all) from a host; without adapters, the host gets its class back."""
    host = model.get_submodule(host_name)
    stack = cast(AdapterStack, host.adapters)
    for gone in [name] if name is not None else list(stack):
        stack.detach_adapter(gone)
    if not len(stack):
        remove_mixin(host, Adapted)
        for mixin in [c for c in type(host).__mro__ if issubclass(c, ComputedReads) and has_mixin(host, c)]:
            remove_mixin(host, mixin)
        del host.adapters
        for key in [k for k, hook in host._forward_pre_hooks.items() if hook is _slow_path]:
            del host._forward_pre_hooks[key]
        for parent in [model.get_submodule(name) for name in parents(host_name)]:
            if "_before_slow_path" in vars(parent) and next(hosts(parent), None) is None:
                vars(parent).update(vars(parent).pop("_before_slow_path"))


def _slow_path(module: nn.Module, args: object) -> None:
    """A hook that does nothing.

    ``nn.TransformerEncoderLayer`` has an inference fast path that reads the weights of its children without calling
    them, which would skip their adapters. It does not use the fast path if a child has a hook.
    """


def _keep_slow_paths(model: nn.Module, host_name: str, host: nn.Module) -> None:
    around = [model.get_submodule(name) for name in parents(host_name)]
    if any(isinstance(p, nn.TransformerEncoderLayer) for p in around):
        host.register_forward_pre_hook(_slow_path)
    for parent in around:
        if isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            vars(parent)["_before_slow_path"] = {"use_nested_tensor": True}
            parent.use_nested_tensor = False  # it would create nested tensors, which only the fast path accepts
