"""The blocks of a model in order of depth: the unit in which layers are chosen, frozen and unfrozen."""

from __future__ import annotations

from torch import nn

from lightning_peft.core.swap import original_class
from lightning_peft.core.targets import base_modules

__all__ = ["find_blocks"]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of ``model`` by qualified name, the first to run first (as far as definition order tells).

    A block is a composite module in a ``ModuleList``, ``Sequential`` or ``ModuleDict`` whose class occurs there at
    least twice; of nested ones the outermost count (a transformer's layers, not their heads). A model without any,
    such as a plain ``Sequential`` of layers, has its layers that own parameters as blocks.
    """
    inside = [
        (f"{name}.{child}" if name else child, module)
        for name, container in base_modules(model)
        if isinstance(container, _CONTAINERS)
        for child, module in container.named_children()
    ]
    composite = [(n, m) for n, m in inside if not isinstance(m, _CONTAINERS) and any(True for _ in m.children())]
    kinds = [original_class(m) for _, m in composite]
    repeated = [(n, m) for n, m in composite if kinds.count(original_class(m)) > 1]
    blocks = [(n, m) for n, m in repeated if not any(n.startswith(f"{other}.") for other, _ in repeated)]
    if blocks:
        return blocks
    return [(n, m) for n, m in base_modules(model) if n and any(True for _ in m.parameters(recurse=False))]
