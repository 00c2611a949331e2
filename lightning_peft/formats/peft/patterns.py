"""Numbers that differ between layers: ``rank_pattern`` and ``alpha_pattern``, PEFT's and ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.core.targeting.base_model import Base

__all__ = ["clean", "most_common", "our_pattern", "pattern_keys", "pattern_value"]


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first of PEFT's patterns that means ``name``: a regular expression for its end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def pattern_keys(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern`` by which PEFT finds just these values at these names."""
    others = {name: value for name, value in values.items() if value != default}
    clash = any(a != b and a.endswith(f".{b}") for a in values for b in others)
    special = any(re.escape(name).replace("\\.", ".") != name for name in others)
    # Plain names, which other readers understand, unless one would be taken for another.
    return {f"^{re.escape(name)}": value for name, value in others.items()} if clash or special else others


def our_pattern(values: Mapping[str, Any], default: Any, base: Base) -> dict[str, Any]:
    """The same for a method of ours: the values that are not ``default``, by patterns that mean just these names."""
    others = [name for name, value in values.items() if value != default]
    return dict(zip(base.patterns(others), (values[name] for name in others)))


def most_common(values: Iterable[Any]) -> Any:
    """The value to write once for all layers."""
    return Counter(values).most_common(1)[0][0]


def clean(value: float) -> float | int:
    """An alpha without the noise of a division and its inverse."""
    near = round(value, 9)
    return int(near) if near == int(near) else near
