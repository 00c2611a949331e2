"""Find the base model inside the user's module, and map names between the two.

A LightningModule that holds a model as ``self.net`` sees its modules as ``net.<module>``. Adapter files leave out that
prefix, so that they also load into another module that holds the same model. :class:`Base` converts the names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, join, relative
from lightning_peft.core.optional import config_value, input_embedding, label_names
from lightning_peft.core.targeting.base_modules import base_modules, base_state_dict
from lightning_peft.core.targeting.patterns import exactly
from lightning_peft.core.targeting.ties import seen_once

__all__ = ["Base", "base_for_keys", "base_of", "depth_of"]


@dataclass(frozen=True)
class Base:
    """The base model inside a module. Adapter directories use names relative to it.

    Attributes:
        root: the module that methods are applied to.
        name: the name of the base inside ``root``; ``""`` if ``root`` is the base.
    """

    root: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The base model."""
        return self.root.get_submodule(self.name)

    def outer(self, name: str) -> str:
        """Convert a name inside the base to the name inside ``root``."""
        return join(self.name, name)

    def inner(self, name: str) -> str | None:
        """Convert a name inside ``root`` to the name inside the base; None if it lies outside the base."""
        return relative(name, self.name) if is_within(name, self.name) else None

    def patterns(self, names: Iterable[str]) -> list[str]:
        """Return patterns for a method on ``root`` that match exactly these names of the base."""
        return [exactly(self.outer(name)) for name in names]

    def modules(self) -> dict[str, nn.Module]:
        """The base's own modules by name, without adapters."""
        return dict(base_modules(self.module))

    def facts(self) -> dict[str, Any]:
        """Facts that identify the base, as plain values: its class and entries of a Hugging Face ``config``."""
        cls, config = original_class(self.module), getattr(self.module, "config", None)
        embedding = input_embedding(self.module)
        return {
            "class": cls.__name__,
            "library": cls.__module__,
            "name_or_path": config_value(config, "_name_or_path") or None,
            "revision": config_value(config, "_commit_hash"),
            "embedding": next((n for n, m in base_modules(self.module) if m is embedding), None),
            "shared": seen_once(self.module),
            "tied": bool(config_value(config, "tie_word_embeddings", False)),
            "labels": label_names(config),
            "pretrained": _is(self.module, "PreTrainedModel", "transformers.modeling_utils"),
        }


def base_of(root: nn.Module, used: Iterable[str] = ()) -> Base:
    """Return the base of a model: the outermost Hugging Face model, or the only module inside a LightningModule.

    Args:
        root: the module that methods are applied to.
        used: names inside ``root`` that must lie in the base.
    """
    used = list(used)
    for name, module in base_modules(root):
        if _is(module, "PreTrainedModel", "transformers.modeling_utils") and all(
            Base(root, name).inner(other) is not None for other in used
        ):
            return Base(root, name)
    name, module = "", root
    while _is(module, "LightningModule", "lightning.pytorch.core.module"):
        children = {n: child for n, child in module.named_children() if base_state_dict(child)}
        if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
            break
        child = next(iter(children))
        if any(Base(root, join(name, child)).inner(other) is None for other in used):
            break
        name, module = join(name, child), children[child]
    return Base(root, name)


def base_for_keys(root: nn.Module, keys: Iterable[str]) -> Base:
    """Return the base that ``keys`` (without prefix) were written for: the module that matches most of their parts."""
    paths = [key.split(".") for key in itertools.islice(keys, 64)]
    first = base_of(root)
    candidates = [(first.name, first.module), *base_modules(root)]
    # max() returns the first of equal candidates, so base_of() wins a tie, and then the outermost module.
    name, _ = max(candidates, key=lambda candidate: sum(depth_of(candidate[1], path) for path in paths))
    return Base(root, name)


def depth_of(module: nn.Module, path: Iterable[str]) -> int:
    """Return how many leading parts of ``path`` name nested modules, starting from ``module``."""
    depth = 0
    for part in path:
        child = module._modules.get(part)
        if child is None:
            break
        module, depth = child, depth + 1
    return depth


def _is(module: nn.Module, name: str, where: str) -> bool:
    """Whether ``module`` is an instance of a class in a library that this package does not import."""
    return any(c.__name__ == name and c.__module__ == where for c in original_class(module).__mro__)
