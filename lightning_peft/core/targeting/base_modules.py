"""List the modules of the base model, without the adapters that methods have inserted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.core.names import is_within

__all__ = ["AdapterContainer", "base_modules"]


class AdapterContainer(nn.ModuleDict):
    """The child module that holds a module's adapters; its class distinguishes it from modules of the base."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, but without the adapters that methods have inserted."""
    inside = None
    for name, module in model.named_modules():
        if isinstance(module, AdapterContainer):
            inside = name  # named_modules() yields the children of a module right after it
        elif inside is None or not is_within(name, inside):
            yield name, module
