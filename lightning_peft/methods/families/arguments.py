"""Checks of methods' arguments; each error names the argument, what was expected and what was given."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any


def _without_numpy(value: Any) -> Any:
    """``value`` with Python's numbers and strings for numpy's scalars, which a checkpoint could not be read with."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    if type(value) is dict:
        return {_without_numpy(k): _without_numpy(v) for k, v in value.items()}
    return value


def one_of(argument: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse ``value`` unless it is among ``choices``."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def positive_int(argument: str, value: Any) -> None:
    """Refuse ``value`` unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument} must be an integer of at least 1, got {value!r}")


def nonzero(argument: str, value: Any) -> None:
    """Refuse ``value`` unless it is a finite number other than 0."""
    if not is_number(value) or value == 0:
        raise ValueError(f"{argument} must be a finite number other than 0, got {value!r}")


def positive(argument: str, value: Any) -> None:
    """Refuse ``value`` unless it is a finite number above 0."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"{argument} must be a number above 0, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def probability(argument: str, value: Any) -> None:
    """Refuse ``value`` unless it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{argument} must be a probability in [0, 1), got {value!r}")
