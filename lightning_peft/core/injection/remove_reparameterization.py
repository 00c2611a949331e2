"""Replace a reparameterization that only training needs (the network that computes a prompt) by its output."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import adapter_names, check_known, stacks
from lightning_peft.core.record import injection_state

__all__ = ["fold"]


@torch.no_grad()
def fold(model: nn.Module, name: str | None = None) -> list[str]:
    """Replace the reparameterization of all adapters, or of the adapter ``name``, by the values it computes.

    The model's output does not change. The network that computed the prompts is removed: later checkpoints are small,
    earlier ones no longer load into this model, and optimizers must be created again.

    Returns:
        The names of the modules whose adapters were folded.

    Raises:
        ValueError: if there is no adapter of that name, or none has a reparameterization.
    """
    if name is not None:
        check_known(model, name)
    found = [
        (host_name, adapter_name, cast(Adapter, adapter))
        for host_name, stack in stacks(model).items()
        for adapter_name, adapter in stack.items()
        if name in (None, adapter_name) and cast(Adapter, adapter).has_reparameterization
    ]
    if not found:
        raise ValueError(
            f"nothing to fold: {list(adapter_names(model))} have no reparameterization, so they train the values that "
            "they apply"
        )
    for _, _, adapter in found:
        adapter.remove_reparameterization()
    record = injection_state(model)
    for adapter_name in {n for _, n, _ in found} if record is not None else ():
        assert record is not None
        record.methods[adapter_name] = record.methods[adapter_name].without_reparameterization()  # type: ignore[attr-defined]
    return [host_name for host_name, _, _ in found]
