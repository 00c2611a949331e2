"""Warn if ``save_pretrained`` is called on an adapted model: it writes adapters under keys that nothing reads."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import add_mixin
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = ["watch_saving"]


class SavesBase:
    """Mixin for a module with ``save_pretrained``: warns that the adapters are not saved."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        left = {n for stack in stacks(self).values() for n in stack if n not in stack.merged_names}  # type: ignore[arg-type]
        if left:
            warnings.warn(
                f"save_pretrained writes the base without its adapters {sorted(left)}: loading the folder returns the "
                "base. Save adapters with lp.save_adapter, or call lp.merge(model) or lp.unload(model, merge=True) "
                "first",
                stacklevel=2,
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def watch_saving(model: nn.Module) -> None:
    """Make ``save_pretrained`` of every module in ``model`` warn about adapters that it does not save."""
    for module in [m for _, m in base_modules(model) if callable(getattr(m, "save_pretrained", None))]:
        add_mixin(module, SavesBase)
