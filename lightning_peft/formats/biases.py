"""Biases of the base that train with an adapter: ``bias="lora_only"`` and ``bias="all"`` of PEFT.

PEFT puts an adapted module's own parameters one level down: ``<module>.base_layer.bias``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_peft.formats.converter import Tensors
from lightning_peft.formats.names import PREFIX, Base
from lightning_peft.formats.snapshot import Snapshot

__all__ = ["take_biases", "write_biases"]


def write_biases(snapshot: Snapshot, targets: Iterable[str]) -> dict[str, Tensor]:
    """The trained biases outside of heads, by PEFT's keys.

    Args:
        snapshot: of the method that trains them.
        targets: the modules that PEFT wraps.
    """
    wrapped = set(targets)
    found = {}
    for name, value in snapshot.trained.items():
        if not any(name.startswith(f"{head}.") for head in snapshot.heads):
            parts = name.split(".")
            for i in range(len(parts) - 1, 0, -1):
                if ".".join(parts[:i]) in wrapped:
                    parts.insert(i, "base_layer")
            if name.endswith("out_proj.bias") and ".".join(name.split(".")[:-2]) in wrapped:
                parts.insert(-1, "base_layer")  # an attention's, which is wrapped with it
            found[PREFIX + ".".join(parts)] = value
    return found


def take_biases(tensors: Tensors, base: Base) -> dict[str, Tensor]:
    """The biases of a file, by their names in the base."""
    state = {name for name, _ in base.module.named_parameters()}
    found = {}
    for key in tensors.keys():  # noqa: SIM118
        name = ".".join(part for part in key.removeprefix(PREFIX).split(".") if part != "base_layer")
        if name.endswith("bias") and name in state and key.startswith(PREFIX):
            shape = tuple(base.module.get_parameter(name).shape)
            found[name] = tensors.take(key.removeprefix(PREFIX), shape)
    return found
