"""The names of parameters and modules: the one that a parameter is known by, and lists of them in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

__all__ = ["canonical", "check_name", "listed", "numbers_as_stars"]


def check_name(name: str) -> None:
    """Refuse an adapter name that could not be a part of a key.

    Raises:
        ValueError: it is no word, or an attribute of the container it would be stored in.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name={name!r} cannot name an adapter: use letters, digits, '_' and '-', and no name that "
            "torch.nn.ModuleDict uses itself (such as 'keys' or 'train')"
        )


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(key: str) -> str:
    """``key`` without the parts that ``torch.compile`` and wrappers put into names."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def numbers_as_stars(name: str) -> str:
    """``name`` with ``*`` for each part that is a number: what names of repeated layers have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def listed(names: Iterable[str]) -> str:
    """All ``names``; those that differ in one number only are one entry, as in ``layers.{0-3,7}.mlp``."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(numbers_as_stars(name), []).append(name)
    return ", ".join(text for kind, of in kinds.items() for text in _together(kind, of))


def _together(kind: str, names: list[str]) -> list[str]:
    columns = list(zip(*(name.split(".") for name in names)))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) > 1:  # experts of layers: too many to write out
        return [f"{kind} ({len(names)})"]
    for i in varying:
        return [".".join(f"{{{_ranges(map(int, c))}}}" if j == i else c[0] for j, c in enumerate(columns))]
    return names


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
