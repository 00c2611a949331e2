"""The one function with which every method resolves ``targets`` and ``exclude``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import nn

from lightning_peft.core.names import is_within
from lightning_peft.core.targeting.patterns import Patterns, TargetError, as_patterns, match, no_match, nothing_left

__all__ = ["select"]

Names = Iterable[str]


def select(
    modules: Mapping[str, nn.Module],
    targets: Patterns,
    exclude: Patterns = (),
    words: Mapping[str, Callable[[], Names]] = MappingProxyType({}),
    *,
    candidates: Callable[[str], Names] | None = None,
    places: Callable[[str], Names] = lambda name: (name,),
    missing: Callable[[str], str] | None = None,
) -> dict[str, str]:
    """Return the candidates that ``targets`` selects and ``exclude`` does not remove.

    Args:
        modules: the base modules by name, without the root.
        targets: reserved words and patterns.
        exclude: patterns that match candidates, or modules that contain candidates.
        words: maps each reserved word to a function that returns its candidates, or raises.
        candidates: returns the candidates that a pattern matches. By default, the modules that it matches.
        places: returns the modules that carry a candidate, which ``exclude`` is compared with. By default, the
            candidate itself.
        missing: returns the error text for a pattern in ``targets`` that matches no candidate. By default, a text with
            the closest module names.

    Returns:
        The selected names, each with the first pattern that matched it.

    Raises:
        TargetError: if patterns match nothing (the message lists all of them), or if nothing is left.
    """

    def matched(pattern: str) -> list[str]:
        return [name for name, module in modules.items() if match(pattern, name, module)]

    def closest(pattern: str) -> str:
        return no_match(pattern, modules)

    candidates, missing = candidates or matched, missing or closest
    chosen: dict[str, str] = {}
    wrong = []
    for pattern in as_patterns(targets, "targets"):
        hits = list(words[pattern]() if pattern in words else candidates(pattern))
        if not hits:
            wrong.append(f"{pattern!r} finds nothing in this model" if pattern in words else missing(pattern))
        for name in hits:
            chosen.setdefault(name, pattern)
    if wrong:
        raise TargetError(f"targets: {'; '.join(wrong)}")
    for pattern in as_patterns(exclude, "exclude"):
        around, named = matched(pattern), set(candidates(pattern))
        wrong += [] if around or named else [closest(pattern)]
        chosen = {n: p for n, p in chosen.items() if n not in named and not _lies_in(places(n), around)}
    if wrong:
        raise TargetError(f"exclude: {'; '.join(wrong)}")
    if not chosen:
        raise TargetError(nothing_left(targets, exclude))
    return chosen


def _lies_in(names: Names, modules: list[str]) -> bool:
    return any(is_within(name, *modules) for name in names)
