"""A registry of method classes. Class names from files are looked up here and never imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft.core.names import nearest

if TYPE_CHECKING:
    from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["method_of_file", "register_method", "registered_method", "registered_methods"]

#: method classes by name, and by the module that defines them
_METHODS: dict[str, dict[str, type[PEFTMethod]]] = {}


def register_method(cls: type[PEFTMethod]) -> None:
    """Add a method class; a later definition in the same module replaces an earlier one."""
    _METHODS.setdefault(cls.__name__, {})[cls.__module__] = cls


def registered_method(name: str) -> type[PEFTMethod]:
    """Return the method class called ``name``.

    Raises:
        ValueError: if no method has that name, or several do.
    """
    if name not in _METHODS:
        near = nearest(name, _METHODS, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise ValueError(f"no method named {name!r}; defined are {sorted(_METHODS)}{hint}")
    found = _METHODS[name]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(sorted(found))} each define a method named {name!r}: rename all but one")
    return next(iter(found.values()))


def registered_methods() -> list[type[PEFTMethod]]:
    """Return every method class, abstract ones too."""
    return [cls for by_module in _METHODS.values() for cls in by_module.values()]


def method_of_file(kind: str, config: Mapping[str, Any]) -> PEFTMethod:
    """Create the method that a file describes.

    Arguments for the initialisation are reset: the file's tensors replace the initial values, and a file must not
    cause a tokenizer to be loaded.

    Raises:
        ValueError, TypeError: if the method is unknown, or does not accept these arguments.
    """
    start = {"init": "random", "init_text": None, "tokenizer": None} if "tokenizer" in config else {}
    return registered_method(kind)(**{**config, **start})
