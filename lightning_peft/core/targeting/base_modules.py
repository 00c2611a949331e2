"""List the modules, parameters and buffers of the base model, without the adapters that methods have inserted.

The walk does not enter the adapters, so it takes no longer with a thousand adapters on a model than with one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.sharded_tensors import flat_part, is_sharded

__all__ = [
    "AdapterContainer",
    "base_buffers",
    "base_modules",
    "base_parameters",
    "base_state_dict",
    "holds_shards",
    "is_fsdp1",
    "local_state_dict",
    "without_fsdp_hooks",
]

_OF_BASE: ContextVar[bool] = ContextVar("of_base", default=False)


class AdapterContainer(nn.ModuleDict):
    """The child module that holds a module's adapters; its class distinguishes it from modules of the base."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination") if _OF_BASE.get() else super().state_dict(*args, **kwargs)


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, but without inserted adapters and modules that ``torch.jit`` compiled."""
    for name, module in _all_modules(model, remove_duplicate):
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def _all_modules(model: nn.Module, remove_duplicate: bool) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if isinstance(module, AdapterContainer) or (remove_duplicate and id(module) in seen):
            continue
        seen.add(id(module))
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""  # faster than join, in a loop over all modules
            waiting += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]


def base_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Like ``model.named_parameters()``, but without the parameters of adapters."""
    seen: set[int] = set()
    for name, module in _all_modules(model, remove_duplicate):
        for key, parameter in module._parameters.items():
            if parameter is not None and not (remove_duplicate and id(parameter) in seen):
                seen.add(id(parameter))
                yield f"{name}.{key}" if name else key, parameter


def base_buffers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Like ``model.named_buffers()``, but without the buffers of adapters."""
    seen: set[int] = set()
    for name, module in _all_modules(model, remove_duplicate):
        for key, buffer in module._buffers.items():
            if buffer is not None and not (remove_duplicate and id(buffer) in seen):
                seen.add(id(buffer))
                yield f"{name}.{key}" if name else key, buffer


def base_state_dict(model: nn.Module, keep_vars: bool = False) -> dict[str, Any]:
    """Like :func:`local_state_dict`, but without the tensors of adapters."""
    token = _OF_BASE.set(True)
    try:
        return local_state_dict(model, keep_vars=keep_vars)
    finally:
        _OF_BASE.reset(token)


def local_state_dict(model: nn.Module, keep_vars: bool = False) -> dict[str, Any]:
    """Like ``nn.Module.state_dict(model)``, but FSDP1 gathers nothing: its parameters are this rank's flat parts."""
    with without_fsdp_hooks(model):
        return nn.Module.state_dict(model, keep_vars=keep_vars)


def is_fsdp1(module: nn.Module) -> bool:
    """Whether ``module`` is a unit of FSDP1."""
    return type(module).__name__ == "FullyShardedDataParallel"


_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


@contextmanager
def without_fsdp_hooks(model: nn.Module) -> Iterator[None]:
    """Keep ``state_dict`` and ``load_state_dict`` from running the hooks of FSDP1, which gather every parameter.

    They are collectives that need memory for the whole model, and they require that all its keys are loaded.
    """
    units = [module for _, module in _all_modules(model, remove_duplicate=True) if is_fsdp1(module)]
    before = [{hooks: vars(unit)[hooks] for hooks in _HOOKS} for unit in units]
    for unit in units:
        vars(unit).update((hooks, OrderedDict()) for hooks in _HOOKS)
    try:
        yield
    finally:
        for unit, hooks in zip(units, before):
            vars(unit).update(hooks)


def holds_shards(model: nn.Module) -> bool:
    """Whether this rank has only parts of the base's parameters: DTensors, or those of DeepSpeed ZeRO or FSDP."""
    return any(
        is_fsdp1(module)
        or any(is_sharded(p) or flat_part(p) is not None or hasattr(p, "ds_id") for p in module._parameters.values())
        for _, module in _all_modules(model, remove_duplicate=True)
    )
