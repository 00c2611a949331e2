"""Names: which module of a model an adapter directory speaks of, and what PEFT calls its parts.

PEFT's keys are ``base_model.model.<module>.<parameter>`` with names as the bare model has them. A LightningModule
that holds that model as ``self.net`` says ``net.<module>`` instead; :class:`Base` maps between the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from lightning_peft.core.swap import original_class
from lightning_peft.core.targets import base_modules
from lightning_peft.methods.weight import exactly

__all__ = ["PREFIX", "Base", "base_for_keys", "base_of"]

#: what every key of PEFT's that belongs to a module starts with
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Base:
    """The module inside a model whose names an adapter directory uses.

    Attributes:
        root: the module that methods are applied to.
        name: the name of the base inside ``root``; ``""`` where they are one.
    """

    root: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The base itself."""
        return self.root.get_submodule(self.name)

    def outer(self, name: str) -> str:
        """A name of the base as ``root`` has it."""
        return ".".join(part for part in (self.name, name) if part)

    def inner(self, name: str) -> str | None:
        """A name of ``root`` as the base has it; None outside of the base."""
        if not self.name or name == self.name:
            return name if not self.name else ""
        return name.removeprefix(f"{self.name}.") if name.startswith(f"{self.name}.") else None

    def patterns(self, names: Iterable[str]) -> list[str]:
        """Patterns for a method on ``root`` that mean exactly these names of the base."""
        return exactly(self.outer(name) for name in names)

    def modules(self) -> dict[str, nn.Module]:
        """The base's own modules by name, as they are without adapters."""
        return dict(base_modules(self.module))


def base_of(root: nn.Module, used: Iterable[str] = ()) -> Base:
    """The base of a model: the outermost Hugging Face model, or the one module that a LightningModule wraps.

    Args:
        root: the module that methods are applied to.
        used: names inside ``root`` that have to lie in the base.
    """
    used = list(used)
    for name, module in base_modules(root):
        if _is_pretrained(module) and all(Base(root, name).inner(other) is not None for other in used):
            return Base(root, name)
    name, module = "", root
    while isinstance(module, L.LightningModule):
        children = {n: child for n, child in module.named_children() if child.state_dict()}
        if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
            break
        child = next(iter(children))
        if any(Base(root, f"{name}.{child}".lstrip(".")).inner(other) is None for other in used):
            break
        name, module = f"{name}.{child}".lstrip("."), children[child]
    return Base(root, name)


def base_for_keys(root: nn.Module, keys: Iterable[str]) -> Base:
    """The base that ``keys`` (without prefix) were written for: the module in which most of their parts are found."""
    keys = list(keys)
    first = base_of(root)
    candidates = [first, *(Base(root, name) for name, _ in base_modules(root))]
    # max takes the first of equals: the base as it would be written, then the outermost.
    return max(candidates, key=lambda base: sum(_depth(base.module, key) for key in keys[:64]))


def _depth(module: nn.Module, key: str) -> int:
    """How many parts of ``key`` name modules, one inside the other, from ``module`` on."""
    depth = 0
    for part in key.split("."):
        child = module._modules.get(part)
        if child is None:
            break
        module, depth = child, depth + 1
    return depth


def _is_pretrained(module: Any) -> bool:
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils"
        for c in original_class(module).__mro__
    )
