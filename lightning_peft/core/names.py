"""Qualified names of modules and parameters: how they are joined, split, compared, and listed in messages.

A qualified name is the path that ``named_modules`` and ``named_parameters`` give, ``encoder.layers.0.attn``; the root's
own name is empty, and holds every other.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

__all__ = [
    "adapter_key",
    "around_all",
    "canonical",
    "check_name",
    "host_of",
    "is_adapter_key",
    "is_within",
    "join",
    "leaf",
    "listed",
    "nearest",
    "numbers_as_stars",
    "owner_of",
    "parents",
    "relative",
]


def join(*parts: str) -> str:
    """The qualified name made of ``parts``; empty ones (the root) are left out."""
    return ".".join(part for part in parts if part)


def owner_of(name: str) -> str:
    """The name of the module that holds ``name`` directly: ``"a.b"`` for ``"a.b.c"``, ``""`` for ``"a"``."""
    return name.rpartition(".")[0]


def leaf(name: str) -> str:
    """The last part of ``name``: ``"c"`` for ``"a.b.c"``."""
    return name.rpartition(".")[2]


def parents(name: str) -> list[str]:
    """The names of the modules around ``name``, from the root to its owner: ``["", "a", "a.b"]`` for ``"a.b.c"``."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts))]


def around_all(names: Iterable[str]) -> list[str]:
    """The names of the modules that hold all of ``names``, or are the only one, from the root to the innermost."""
    levels = zip(*([*parents(name), name] for name in names))
    return [level[0] for level in levels if len(set(level)) == 1] or [""]


def is_within(name: str, *modules: str) -> bool:
    """Whether ``name`` is one of ``modules`` or lies in one of them; everything lies in the root, ``""``."""
    return any(name == module or not module or name.startswith(f"{module}.") for module in modules)


def relative(name: str, module: str) -> str:
    """``name`` as seen from ``module``, in which it lies: ``"c"`` for ``"a.b.c"`` in ``"a.b"``, ``""`` for itself.

    Raises:
        ValueError: ``name`` does not lie in ``module``.
    """
    if not is_within(name, module):
        raise ValueError(f"{name!r} does not lie in {module!r}")
    return name[len(module) :].removeprefix(".")


def adapter_key(host: str, adapter: str, *rest: str) -> str:
    """The key of what an adapter owns: ``"mlp.up.adapters.default.lora_A"`` for the module ``"mlp.up"``."""
    return join(host, _ADAPTERS, adapter, *rest)


def is_adapter_key(key: str, adapter: str = "") -> bool:
    """Whether ``key`` belongs to an adapter, or to the one called ``adapter``."""
    return f".{join(_ADAPTERS, adapter)}." in f".{key}"


def host_of(key: str) -> str:
    """The name of the module whose adapter owns ``key``; ``key`` itself if no adapter does."""
    host, found, _ = f".{key}".partition(f".{_ADAPTERS}.")
    return host.removeprefix(".") if found else key


def nearest(word: str, words: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to ``n`` of ``words`` that are spelled most like ``word``, the closest first: what was meant, for messages."""
    return difflib.get_close_matches(word, list(words), n=n, cutoff=cutoff)


_ADAPTERS = "adapters"  # the child of an adapted module that holds its adapters


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
