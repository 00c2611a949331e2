"""The blocks of a model in order of depth: the unit in which layers are chosen, frozen and unfrozen."""

from __future__ import annotations

from torch import nn

from lightning_peft.core.frozen import in_frozen_part
from lightning_peft.core.swap import original_class
from lightning_peft.core.targets import base_modules

__all__ = ["find_blocks"]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of ``model`` by qualified name, the first to run first (as far as definition order tells).

    A block is a composite module in a ``ModuleList``, ``Sequential`` or ``ModuleDict`` whose class occurs there at
    least twice, or that is the only one in it; of nested ones the outermost count (a transformer's layers, not their
    heads). A model without any, such as a plain ``Sequential`` of layers, has its layers that own parameters as
    blocks. Parts that the user froze as a whole have none.
    """
    left_alone = in_frozen_part(model)
    inside = [
        (f"{name}.{child}" if name else child, module, len(container))
        for name, container in base_modules(model)
        if isinstance(container, _CONTAINERS)
        for child, module in container.named_children()
    ]
    composite = [
        (n, m, size)
        for n, m, size in inside
        if not isinstance(m, _CONTAINERS) and any(True for _ in m.children()) and not left_alone(n)
    ]
    kinds = [original_class(m) for _, m, _ in composite]
    repeated = [(n, m) for n, m, _ in composite if kinds.count(original_class(m)) > 1]
    every = sum(1 for _ in model.parameters())
    alone = [(n, m) for n, m, size in composite if size == 1 and sum(1 for _ in m.parameters()) < every]
    if blocks := _outermost(repeated) or _outermost(alone):
        return blocks
    owners = [(n, m) for n, m in base_modules(model) if n and any(True for _ in m.parameters(recurse=False))]
    return [(n, m) for n, m in owners if not left_alone(n)]


def _outermost(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in blocks if not any(n.startswith(f"{other}.") for other, _ in blocks)]
