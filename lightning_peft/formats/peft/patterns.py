"""Convert ``rank_pattern`` and ``alpha_pattern``, which set numbers for single layers, between PEFT and our methods."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.formats.peft.converter import Options

__all__ = ["LayerRanks", "RankOptions", "clean", "rank_arguments"]


class RankOptions(NamedTuple):
    """PEFT's options for the rank and the alpha of each layer: one of each, and patterns for the layers that differ.

    Attributes:
        alpha: PEFT's name of the option for alpha.
    """

    alpha: str = "alpha"

    def written(self, values: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
        """PEFT's options for the (rank, alpha) of each layer, by the layer's name."""
        (ranks, alphas), (r, alpha) = _apart(values), _most_common(values)
        patterns = {"rank_pattern": _pattern_keys(ranks, r), "alpha_pattern": _pattern_keys(alphas, alpha)}
        return {"r": r, self.alpha: alpha, **patterns}

    def read(self, options: Options) -> LayerRanks:
        """The ranks and alphas in PEFT's ``options``.

        Raises:
            FormatError: if the rank or the alpha of all layers is not a number.
        """
        default = options.number("r", 8), options.number(self.alpha, 8)
        return LayerRanks(default, options.get("rank_pattern") or {}, options.get("alpha_pattern") or {})


class LayerRanks(NamedTuple):
    """The ranks and alphas that PEFT's options give to the layers.

    Attributes:
        default: The (rank, alpha) of layers that no pattern matches.
        rank_pattern: Ranks by pattern.
        alpha_pattern: Alphas by pattern.
    """

    default: tuple[int, float]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def at(self, name: str) -> tuple[int, float]:
        """The (rank, alpha) of the layer ``name``."""
        r, alpha = self.default
        return _pattern_value(self.rank_pattern, name, r), _pattern_value(self.alpha_pattern, name, alpha)


def rank_arguments(
    values: Mapping[str, tuple[int, float]], base: Base, default: tuple[int, float] | None = None
) -> dict[str, Any]:
    """The arguments of our methods for the (rank, alpha) of each layer.

    Args:
        values: The ranks and alphas by the layer's name.
        base: The base that has the layers.
        default: The ``r`` and ``alpha`` of the method; None takes the most common ones.
    """
    (ranks, alphas), (r, alpha) = _apart(values), default or _most_common(values)
    patterns = {"rank_pattern": _our_pattern(ranks, r, base), "alpha_pattern": _our_pattern(alphas, alpha, base)}
    return {"r": r, "alpha": alpha, **patterns}


def _apart(values: Mapping[str, tuple[int, float]]) -> tuple[dict[str, int], dict[str, float]]:
    """The ranks and the alphas, each by the layer's name."""
    return {name: r for name, (r, _) in values.items()}, {name: alpha for name, (_, alpha) in values.items()}


def _most_common(values: Mapping[str, tuple[int, float]]) -> tuple[int, float]:
    """The most common rank and the most common alpha, which are written once for all layers."""
    (r, _), *_ = Counter(r for r, _ in values.values()).most_common(1)
    (alpha, _), *_ = Counter(alpha for _, alpha in values.values()).most_common(1)
    return r, alpha


def _pattern_keys(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` with which PEFT finds exactly these values at these names."""
    others = {name: value for name, value in values.items() if value != default}
    clash = any(a != b and a.endswith(f".{b}") for a in values for b in others)
    special = any(re.escape(name).replace("\\.", ".") != name for name in others)
    # Plain names are used unless one would match another's end, because other tools can read plain names only.
    return {f"^{re.escape(name)}": value for name, value in others.items()} if clash or special else others


def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first PEFT pattern that matches ``name``, as a regular expression for its end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _our_pattern(values: Mapping[str, Any], default: Any, base: Base) -> dict[str, Any]:
    """Return the values that are not ``default`` for our methods, by patterns that match exactly these names."""
    others = [name for name, value in values.items() if value != default]
    return dict(zip(base.patterns(others), (values[name] for name in others)))


def clean(value: float) -> float | int:
    """Round off the error of dividing an alpha by r and multiplying by it again; integers become ``int``."""
    near = round(value, 9)
    return int(near) if near == int(near) else near
