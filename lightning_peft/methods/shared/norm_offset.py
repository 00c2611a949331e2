"""Determine how a norm layer uses its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class

__all__ = ["norm_offset"]

_TORCH_NORMS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization")


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float | None:
    """c (0 or 1) if a norm layer multiplies by (weight + c), determined by running it; None if it does neither."""
    if any(c.__module__ in _TORCH_NORMS for c in original_class(norm).__mro__):
        return 0.0
    size = norm.get_parameter("weight").shape[0]
    # Explicit, because a strategy may have changed the default dtype and device (to meta, for example).
    here: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    x = torch.linspace(-1.0, 2.0, 2 * size, **here).view(2, size)

    def run(value: float) -> Tensor:
        parameters = {n: torch.zeros(p.shape, **here) for n, p in norm._parameters.items() if p is not None}
        return torch.func.functional_call(
            norm, {**parameters, "weight": torch.full((size,), value, **here)}, (x,)
        ).float()

    try:
        at_zero, at_one, at_two = run(0.0), run(1.0), run(2.0)
    except Exception:  # a norm layer that needs other arguments is not one of the known kinds
        return None
    slope = at_one - at_zero
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * slope, atol=1e-5) and torch.allclose(
            at_two, (offset + 2) * slope, atol=1e-5
        ):
            return offset
    return None
