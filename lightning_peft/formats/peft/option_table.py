"""Tables of PEFT options that correspond to arguments of our methods, used for both writing and reading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.peft.converter import Options

__all__ = ["Option", "flag", "read_options", "written_options"]


class Option(NamedTuple):
    """A PEFT option that has the same values as an argument of our method.

    Attributes:
        peft: The option's name in PEFT.
        default: The value if a file does not have the option. For a bool or a float, the type is checked on reading.
        ours: The argument's name; empty if it is the same.
    """

    peft: str
    default: bool | int | float
    ours: str = ""


def written_options(table: Iterable[Option], method: object) -> dict[str, Any]:
    """Return PEFT's options for the arguments of ``method``."""
    return {option.peft: getattr(method, option.ours or option.peft) for option in table}


def read_options(table: Iterable[Option], options: Options) -> dict[str, Any]:
    """Return our arguments for PEFT's ``options``.

    Raises:
        FormatError: if a value has another type than the option's default.
    """
    return {option.ours or option.peft: _read(option, options) for option in table}


def _read(option: Option, options: Options) -> Any:
    if isinstance(option.default, bool):
        return flag(options, option.peft, option.default)
    if isinstance(option.default, float):
        return options.number(option.peft, option.default)
    return options.get(option.peft, option.default)  # the method's constructor checks integers


def flag(options: Options, option: str, default: bool = False) -> bool:
    """Return an option that must be true or false.

    Raises:
        FormatError: if it is neither.
    """
    value = options.get(option, default)
    if not isinstance(value, bool):
        raise FormatError(f"{option} must be true or false, got {value!r}")
    return value
