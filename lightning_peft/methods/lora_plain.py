"""LoRA whose factors started as a part of the weight, written as plain LoRA of twice the rank.

    s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]

Plain LoRA on the same base then gives the same function, which any reader of LoRA understands.
"""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.host import AdapterStack, hosts
from lightning_peft.core.inject import injection_of
from lightning_peft.methods.lora import LoRA, LoRAAdapter
from lightning_peft.methods.lora_init import reads_weight

__all__ = ["as_plain_lora"]


def as_plain_lora(model: nn.Module, name: str = "default") -> tuple[LoRA, dict[str, Tensor]]:
    """The method and the state by which a fresh base gets the adapter called ``name`` as plain LoRA.

    Where the adapter is plain already, these are its own configuration and its own tensors.

    Args:
        model: an adapted model; left as it is.
        name: the adapter.

    Returns:
        The method to apply to the base, and the adapter's tensors by key for it.

    Raises:
        ValueError: no adapter of that name, or it is no LoRA (DoRA has no plain form).

    Example::

        method, state = as_plain_lora(model)
        lp.apply(base, method)
        base.load_state_dict(state, strict=False)
    """
    record = injection_of(model)
    method = record.methods.get(name) if record is not None else None
    if type(method) is not LoRA:
        known = [n for n, m in record.methods.items() if type(m) is LoRA] if record is not None else []
        raise ValueError(f"{name!r} is no LoRA of this model; it has {known}")
    state: dict[str, Tensor] = {}
    for host_name, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        for inside, part in stack[name].named_modules() if name in stack else ():
            if isinstance(part, LoRAAdapter):
                prefix = ".".join(p for p in (host_name, "adapters", name, inside) if p)
                a, b = part.factors()
                state |= {f"{prefix}.lora_A": a.detach().clone(), f"{prefix}.lora_B": b.detach().clone()}
    return LoRA(**_doubled(method) if reads_weight(method.init) else method.config()), state


def _doubled(method: LoRA) -> dict[str, Any]:
    by = math.sqrt(2) if method.use_rslora else 2
    return {
        **method.config(),
        "init": "kaiming",
        "r": 2 * method.r,
        "alpha": by * method.alpha,
        "rank_pattern": {pattern: 2 * r for pattern, r in method.rank_pattern.items()},
        "alpha_pattern": {pattern: by * alpha for pattern, alpha in method.alpha_pattern.items()},
    }
