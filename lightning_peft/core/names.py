"""Join, split and compare qualified names of modules and parameters, and list them in messages.

A qualified name is a path as in ``named_modules`` and ``named_parameters``, such as ``encoder.layers.0.attn``. The name
of the root is the empty string, and contains every other name.
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
    "reserve",
]


def join(*parts: str) -> str:
    """Join ``parts`` to a qualified name; empty parts (the root) are dropped."""
    return ".".join(part for part in parts if part)


def owner_of(name: str) -> str:
    """Return the name of the direct parent of ``name``: ``"a.b"`` for ``"a.b.c"``, ``""`` for ``"a"``."""
    return name.rpartition(".")[0]


def leaf(name: str) -> str:
    """Return the last part of ``name``: ``"c"`` for ``"a.b.c"``."""
    return name.rpartition(".")[2]


def parents(name: str) -> list[str]:
    """Return the names of all parents of ``name``, outermost first: ``["", "a", "a.b"]`` for ``"a.b.c"``."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts))]


def around_all(names: Iterable[str]) -> list[str]:
    """Return the names of the modules that contain all of ``names``, outermost first; a single name includes itself."""
    levels = zip(*([*parents(name), name] for name in names))
    return [level[0] for level in levels if len(set(level)) == 1] or [""]


def is_within(name: str, *modules: str) -> bool:
    """Whether ``name`` equals one of ``modules`` or lies inside one; every name lies inside the root, ``""``."""
    return any(name == module or not module or name.startswith(f"{module}.") for module in modules)


def relative(name: str, module: str) -> str:
    """Return ``name`` relative to ``module``: ``"c"`` for ``"a.b.c"`` in ``"a.b"``, ``""`` for ``module`` itself.

    Raises:
        ValueError: if ``name`` does not lie inside ``module``.
    """
    if not is_within(name, module):
        raise ValueError(f"{name!r} is not inside {module!r}")
    return name[len(module) :].removeprefix(".")


def adapter_key(host: str, adapter: str, *rest: str) -> str:
    """Return the key of an adapter's tensor: ``"mlp.up.adapters.default.lora_A"`` for the module ``"mlp.up"``."""
    return join(host, _ADAPTERS, adapter, *rest)


def is_adapter_key(key: str, adapter: str = "") -> bool:
    """Whether ``key`` belongs to an adapter; if ``adapter`` is given, to the adapter of that name."""
    return f".{join(_ADAPTERS, adapter)}." in f".{key}"


def host_of(key: str) -> str:
    """Return the name of the module whose adapter ``key`` belongs to; ``key`` itself if it belongs to none."""
    host, found, _ = f".{key}".partition(f".{_ADAPTERS}.")
    return host.removeprefix(".") if found else key


def nearest(word: str, words: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return up to ``n`` of ``words`` with the most similar spelling to ``word``, closest first, for messages."""
    return difflib.get_close_matches(word, list(words), n=n, cutoff=cutoff)


_ADAPTERS = "adapters"  # the child of an adapted module that holds its adapters

_RESERVED = set(dir(nn.ModuleDict()))


def reserve(names: Iterable[str]) -> None:
    """Refuse ``names`` as adapter names; called with the attributes of the container that stores adapters."""
    _RESERVED.update(names)


def check_name(name: str) -> None:
    """Check that ``name`` can name an adapter, so that it can be part of a key.

    Raises:
        ValueError: if it contains other characters, or is an attribute of the container that stores adapters.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in _RESERVED:
        raise ValueError(
            f"name={name!r} cannot name an adapter: use letters, digits, '_' and '-', and not a name that the "
            "container of adapters uses itself (such as 'keys' or 'train')"
        )


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(key: str) -> str:
    """Return ``key`` without the parts that ``torch.compile`` and wrappers insert into names."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def numbers_as_stars(name: str) -> str:
    """Replace each number in ``name`` by ``*``, so that the names of repeated layers become equal."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def listed(names: Iterable[str]) -> str:
    """List ``names`` in one string; names that differ only in one number are grouped, as in ``layers.{0-3,7}.mlp``."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(numbers_as_stars(name), []).append(name)
    return ", ".join(text for kind, of in kinds.items() for text in _together(kind, of))


def _together(kind: str, names: list[str]) -> list[str]:
    columns = list(zip(*(name.split(".") for name in names)))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) > 1:  # experts inside layers: too many to list
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
