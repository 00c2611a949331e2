"""List the modules, parameters and buffers of the base model, without the adapters that methods have inserted.

The walk does not enter the adapters, so it takes no longer with a thousand adapters on a model than with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.sharded_tensors import is_sharded

__all__ = ["AdapterContainer", "base_buffers", "base_modules", "base_parameters", "base_state_dict", "holds_shards"]

_OF_BASE: ContextVar[bool] = ContextVar("of_base", default=False)


class AdapterContainer(nn.ModuleDict):
    """The child module that holds a module's adapters; its class distinguishes it from modules of the base."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination") if _OF_BASE.get() else super().state_dict(*args, **kwargs)


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, but without inserted adapters and without what ``torch.jit`` has compiled."""
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
    """Like ``nn.Module.state_dict(model)``, but without the tensors of adapters."""
    token = _OF_BASE.set(True)
    try:
        return nn.Module.state_dict(model, keep_vars=keep_vars)
    finally:
        _OF_BASE.reset(token)


def holds_shards(model: nn.Module) -> bool:
    """Whether this rank has only parts of the base's parameters: DTensors, or those of DeepSpeed ZeRO or FSDP."""
    return any(
        type(module).__name__ == "FullyShardedDataParallel"
        or any(is_sharded(p) or hasattr(p, "ds_id") for p in module._parameters.values())
        for _, module in _all_modules(model, remove_duplicate=True)
    )
