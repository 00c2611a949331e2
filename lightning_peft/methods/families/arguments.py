"""Checks and converters for arguments; error messages name the argument, the expected value and the given one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attrs import Attribute
from attrs.validators import optional

__all__ = [
    "Check",
    "as_dict",
    "as_list",
    "each",
    "integer",
    "is_int",
    "is_number",
    "nonnegative",
    "nonnegative_int",
    "nonzero",
    "one_of",
    "one_or_each",
    "open_unit_interval",
    "optional",
    "positive",
    "positive_int",
    "probability",
]


@dataclass(frozen=True)
class Check:
    """A condition on one argument, usable as an attrs validator.

    Args:
        expected: text that completes "{argument} must be ...".
        holds: returns True for valid values.
    """

    expected: str
    holds: Callable[[Any], bool]

    def __call__(self, _: Any, argument: Attribute[Any], value: Any) -> None:
        self.require(argument.name, value)

    def require(self, argument: str, value: Any) -> None:
        """Check one value.

        Raises:
            ValueError: if the value is invalid; the message names the argument, the expected and the given value.
        """
        if not self.holds(value):
            raise ValueError(f"{argument} must be {self.expected}, got {value!r}")


def is_number(value: Any) -> bool:
    """True if ``value`` is a finite number; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_int(value: Any) -> bool:
    """True if ``value`` is an integer; False for a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


integer = Check("an integer", is_int)
positive_int = Check("an integer of at least 1", lambda value: is_int(value) and value >= 1)
nonnegative_int = Check("an integer of at least 0", lambda value: is_int(value) and value >= 0)
nonzero = Check("a finite number other than 0", lambda value: is_number(value) and value != 0)
positive = Check("a number above 0", lambda value: is_number(value) and value > 0)
nonnegative = Check("a number of 0 or above", lambda value: is_number(value) and value >= 0)
probability = Check("a probability in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
open_unit_interval = Check("a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1)


def one_of(*choices: Any) -> Check:
    """A check that the value is one of ``choices``."""
    return Check(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def each(check: Check) -> Callable[[Any, Attribute[Any], Mapping[Any, Any]], None]:
    """Apply ``check`` to every value of a mapping; messages include the key, as in ``rank_pattern['q_proj']``."""

    def check_each(_: Any, argument: Attribute[Any], value: Mapping[Any, Any]) -> None:
        for key, one in value.items():
            check.require(f"{argument.name}[{key!r}]", one)

    return check_each


def one_or_each(check: Check) -> Callable[[Any, Attribute[Any], Any], None]:
    """Apply ``check`` to a single value, or to every value of a mapping."""

    def check_value(method: Any, argument: Attribute[Any], value: Any) -> None:
        (each(check) if isinstance(value, Mapping) else check)(method, argument, value)

    return check_value


def as_dict(value: Mapping[Any, Any] | None) -> dict[Any, Any]:
    """``value`` as a plain dict; empty for None."""
    return dict(value or {})


def as_list(value: Any) -> Any:
    """Convert a sequence to a list; strings, None and other values are returned unchanged."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
