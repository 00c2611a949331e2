"""The base's own modules, apart from the adapters that methods have put in."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.core.names import is_within

__all__ = ["AdapterContainer", "base_modules"]


class AdapterContainer(nn.ModuleDict):
    """Marks the child module that holds adapters, so that the base's own modules can be told from it."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the adapters that methods have put in."""
    inside = None
    for name, module in model.named_modules():
        if isinstance(module, AdapterContainer):
            inside = name  # what a module holds comes right after it
        elif inside is None or not is_within(name, inside):
            yield name, module
