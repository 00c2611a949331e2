r"""Resolve target patterns; error messages suggest close matches.

A pattern is one of

* a name or the end of one: ``q_proj``, ``self_attn.q_proj``;
* a glob over the name or the end of it: ``encoder.layer.*.query``;
* ``re:`` and a regular expression for the whole name: ``re:.*layers\.[0-3]\..*``;
* ``type:`` and a class name, base classes included: ``type:Conv2d``.

A pattern that matches nothing is always an error, because a missed target would silently train nothing.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical, join, leaf, nearest
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = [
    "Patterns",
    "TargetError",
    "as_patterns",
    "bare_parameters",
    "exactly",
    "match",
    "match_modules",
    "match_parameters",
    "nothing_left",
]

Patterns = str | Sequence[str]


class TargetError(ValueError):
    """A pattern matches nothing in the model, or matches something that the method cannot adapt."""


def as_patterns(patterns: Patterns, argument: str) -> tuple[str, ...]:
    """Return the patterns of a user's ``argument`` as a tuple, after checking each of them.

    Raises:
        TargetError: if a pattern is empty, is an invalid regular expression, or holds several patterns in one string.
    """
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str) or not pattern:
            raise TargetError(f"{argument} must hold non-empty strings, got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise TargetError(f"{argument}: {pattern!r} is not a valid regular expression: {error}") from None
        elif "," in pattern or " " in pattern.strip():
            separate = [part.strip() for part in re.split(r"[,\s]+", pattern) if part.strip()]
            raise TargetError(f"{argument}: {pattern!r} holds several names in one string; write {argument}={separate}")
    return listed


def exactly(name: str) -> str:
    """Return a pattern that matches ``name`` and nothing else."""
    return f"re:{re.escape(name)}"


def match(pattern: str, name: str, module: nn.Module | None = None) -> bool:
    """Whether ``pattern`` matches ``name``; a ``type:`` pattern is compared with the class of ``module``."""
    if pattern.startswith("type:"):
        return module is not None and any(c.__name__ == pattern[5:] for c in original_class(module).__mro__)
    name = canonical(name)
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def match_modules(model: nn.Module, patterns: Iterable[str], argument: str) -> dict[str, nn.Module]:
    """Return the base modules that ``patterns`` match, in model order.

    Raises:
        TargetError: if a pattern matches no module.
    """
    modules = {name: module for name, module in base_modules(model) if name}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {name: module for name, module in modules.items() if match(pattern, name, module)}
        if not hits:
            raise TargetError(f"{argument}: {no_match(pattern, modules)}")
        found |= hits
    return {name: module for name, module in modules.items() if name in found}


def match_parameters(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of the base parameters that ``pattern`` matches, in model order; ``type:`` matches none."""
    owners = base_modules(model)
    names = (join(n, k) for n, m in owners for k, p in m._parameters.items() if p is not None)
    return [name for name in names if match(pattern, name)]


def bare_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parameters held by a module that has submodules (a logit scale, query tokens): name to module."""
    around = ((name, module) for name, module in base_modules(model) if any(True for _ in module.children()))
    return {join(n, k): m for n, m in around for k, p in m._parameters.items() if p is not None}


def no_match(
    pattern: str, candidates: Mapping[str, nn.Module], accepts: Callable[[str], bool] = lambda hint: True
) -> str:
    """Return the error text for a pattern that matched none of ``candidates``, with the closest valid names.

    Args:
        pattern: the pattern.
        candidates: what it was compared with, by name.
        accepts: whether a suggested pattern would be accepted.
    """
    kind, text = ("type:", pattern[5:]) if pattern.startswith("type:") else ("", pattern)
    if kind:
        words = {original_class(module).__name__ for module in candidates.values()}
    else:
        words = {suffix for name in candidates for suffix in _suffixes(name)}
    near = nearest(text, sorted(words), n=4, cutoff=0.5)
    near = near or sorted(set(map(leaf, candidates)) if not kind else words)[:12]
    near = [kind + word for word in near if accepts(kind + word)]
    hint = f"; nearest: {', '.join(near)}" if near else "" if words else "; the model has none to match"
    return f"{pattern!r} matches nothing{hint}"


def nothing_left(targets: Patterns, exclude: Patterns) -> str:
    """Return the error text for a selection with no result: ``targets`` is empty, or ``exclude`` removes all of it."""
    if not as_patterns(targets, "targets"):
        return f"targets={targets!r} is empty, so nothing would be adapted: pass 'all-linear' or patterns"
    return f"exclude={exclude!r} excludes everything that targets={targets!r} matches, so nothing is left: exclude less"


def _suffixes(name: str) -> list[str]:
    # A suffix that starts with a layer index ("0.q_proj") would suggest a single layer, which is rarely what was meant.
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts)) if not parts[i].isdigit()]
