"""Find the modules that carry adapters, and the adapters by name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import cast

from torch import nn

from lightning_peft.core.adapters.stack import Adapted, AdapterStack
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.names import adapter_key
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = ["active_names", "adapter_names", "check_known", "check_unmerged", "hosts", "stack_prefixes", "stacks"]


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of ``model`` that carry adapters, with their qualified names."""
    for name, module in base_modules(model):
        if has_mixin(module, Adapted):
            yield name, module


def stacks(model: nn.Module) -> dict[str, AdapterStack]:
    """Return the adapter stacks in ``model``, by the qualified name of their host."""
    return {name: cast(AdapterStack, host.adapters) for name, host in hosts(model)}


def stack_prefixes(model: nn.Module, name: str | None = None) -> tuple[str, ...]:
    """Return the key prefixes of all adapters in ``model``, or of those called ``name``, under every host name."""
    named = base_modules(model, remove_duplicate=False)
    return tuple(f"{adapter_key(host, name or '')}." for host, module in named if has_mixin(module, Adapted))


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all adapters in ``model``, in order of application."""
    return tuple(dict.fromkeys(chain.from_iterable(stack._modules for stack in stacks(model).values())))


def active_names(model: nn.Module) -> set[str]:
    """Return the names of the adapters that are active on any module of ``model``."""
    return {name for stack in stacks(model).values() for name in stack.active}


def check_known(model: nn.Module, *names: str) -> None:
    """Check that ``model`` has adapters with these names.

    Raises:
        ValueError: if a name is unknown; the message lists the existing names.
    """
    found = stacks(model).values()
    for name in names:
        if not any(name in stack._modules for stack in found):
            raise ValueError(f"no adapter named {name!r}; the model has {list(adapter_names(model))}")


def check_unmerged(model: nn.Module) -> None:
    """Check that no adapters are merged into the weights of ``model``.

    Raises:
        ValueError: if some are.
    """
    if any(stack.merged is not None for stack in stacks(model).values()):
        raise ValueError("adapters are merged into the base: call lp.unmerge(model) first")
