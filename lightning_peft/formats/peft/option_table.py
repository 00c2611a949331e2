"""Options of PEFT's that are arguments of ours: each converter has one table of them, for writing and for reading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.peft.converter import Options

__all__ = ["Option", "flag", "read_options", "written_options"]


class Option(NamedTuple):
    """One option of PEFT's whose values are those of an argument of ours.

    Attributes:
        peft: its name in PEFT.
        default: its value in a file without it; true or false and numbers with a point are checked when read.
        ours: the argument's name; empty if it is the same.
    """

    peft: str
    default: bool | int | float
    ours: str = ""


def written_options(table: Iterable[Option], method: object) -> dict[str, Any]:
    """PEFT's options for the arguments of ``method``."""
    return {option.peft: getattr(method, option.ours or option.peft) for option in table}


def read_options(table: Iterable[Option], options: Options) -> dict[str, Any]:
    """Our arguments for PEFT's ``options``.

    Raises:
        FormatError: a value of another type than the option's.
    """
    return {option.ours or option.peft: _read(option, options) for option in table}


def _read(option: Option, options: Options) -> Any:
    if isinstance(option.default, bool):
        return flag(options, option.peft, option.default)
    if isinstance(option.default, float):
        return options.number(option.peft, option.default)
    return options.get(option.peft, option.default)  # the method's constructor checks whole numbers


def flag(options: Options, option: str, default: bool = False) -> bool:
    """An option that is true or false.

    Raises:
        FormatError: it is neither.
    """
    value = options.get(option, default)
    if not isinstance(value, bool):
        raise FormatError(f"{option} must be true or false, got {value!r}")
    return value
