"""Make Lightning's ``BitsandbytesPrecision`` replace linear layers by quantised ones before injection, not after.

Lightning replaces the layers when the strategy is set up, which would remove the adapters, and it replaces the class
``torch.nn.Linear`` itself while ``configure_model`` runs, adapters included. Here the layers are replaced and quantised
right before methods are applied, and the class is replaced for the user's own ``configure_model`` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.targeting.packed import is_packed

__all__ = ["convert_layers", "creating_layers", "defer_class_replacement"]


def _plugin(trainer: Any) -> Any:
    plugin = getattr(trainer, "precision_plugin", None)
    return plugin if any(c.__name__ == "BitsandbytesPrecision" for c in type(plugin).__mro__) else None


def defer_class_replacement(trainer: Any) -> None:
    """Keep Lightning from replacing ``torch.nn.Linear`` while methods are applied; idempotent."""
    if (plugin := _plugin(trainer)) is not None:
        plugin.module_init_context = nullcontext


@contextmanager
def creating_layers(trainer: Any, module: nn.Module) -> Iterator[None]:
    """The context in which the user's own ``configure_model`` runs.

    Raises:
        RuntimeError: by Lightning, if the plugin has ``ignore_modules`` and the module has a ``configure_model``.
    """
    plugin, own = _plugin(trainer), original_class(module).configure_model  # type: ignore[attr-defined]
    created_there = not own.__module__.startswith(("lightning.", "pytorch_lightning."))
    with type(plugin).module_init_context(plugin) if plugin is not None and created_there else nullcontext():
        yield


def convert_layers(trainer: Any, module: nn.Module) -> None:
    """Replace linear layers by quantised ones, except those in ``ignore_modules``."""
    if (plugin := _plugin(trainer)) is None:
        return
    plugin.convert_module(module)
    for layer in module.modules():
        if is_packed(layer):
            layer.to(trainer.strategy.root_device)  # quantises the weight, unless it is quantised already
            # When a state is loaded, Lightning quantises every key that ends in "weight", including an adapter's.
            layer._load_state_dict_pre_hooks.clear()
