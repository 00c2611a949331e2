"""Convert ``rank_pattern`` and ``alpha_pattern``, which set numbers for single layers, between PEFT and our methods."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.core.targeting.base_model import Base

__all__ = ["clean", "most_common", "our_pattern", "pattern_value", "ranks_and_alphas"]


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first PEFT pattern that matches ``name``, as a regular expression for its end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def pattern_keys(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` with which PEFT finds exactly these values at these names."""
    others = {name: value for name, value in values.items() if value != default}
    clash = any(a != b and a.endswith(f".{b}") for a in values for b in others)
    special = any(re.escape(name).replace("\\.", ".") != name for name in others)
    # Plain names are used unless one would match another's end, because other tools can read plain names only.
    return {f"^{re.escape(name)}": value for name, value in others.items()} if clash or special else others


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha: str = "alpha") -> dict[str, Any]:
    """PEFT's options for the rank and the alpha of each layer.

    Args:
        ranks: The ranks by the layer's name.
        alphas: The alphas by the layer's name.
        alpha: PEFT's name of the option.
    """
    r, common = most_common(ranks.values()), most_common(alphas.values())
    patterns = {"rank_pattern": pattern_keys(ranks, r), "alpha_pattern": pattern_keys(alphas, common)}
    return {"r": r, alpha: common, **patterns}


def our_pattern(values: Mapping[str, Any], default: Any, base: Base) -> dict[str, Any]:
    """Return the values that are not ``default`` for our methods, by patterns that match exactly these names."""
    others = [name for name, value in values.items() if value != default]
    return dict(zip(base.patterns(others), (values[name] for name in others)))


def most_common(values: Iterable[Any]) -> Any:
    """The most common value, which is written once for all layers."""
    return Counter(values).most_common(1)[0][0]


def clean(value: float) -> float | int:
    """Round off the error of dividing an alpha by r and multiplying by it again; integers become ``int``."""
    near = round(value, 9)
    return int(near) if near == int(near) else near
