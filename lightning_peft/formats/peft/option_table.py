"""Tables of PEFT options that correspond to arguments of our methods, used for both writing and reading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.peft.converter import Options

__all__ = ["Option", "flag", "read_options", "written_options"]


class Option(NamedTuple):
    """A PEFT option that corresponds to an argument of our method.

    Attributes:
        peft: The option's name in PEFT.
        default: The value if a file does not have the option. For a bool or a float, the type is checked on reading.
        ours: The argument's name; empty if it is the same.
        values: Pairs of PEFT's value and ours, where they differ. The first pair with our value is written.
        only_listed: Whether PEFT's values are exactly those in ``values``.
    """

    peft: str
    default: bool | int | float
    ours: str = ""
    values: tuple[tuple[Any, Any], ...] = ()
    only_listed: bool = False

    def written(self, value: Any) -> Any:
        """PEFT's value for our ``value``."""
        return next((theirs for theirs, ours in self.values if ours == value), value)

    def read(self, options: Options) -> Any:
        """Our value for PEFT's ``options``.

        Raises:
            FormatError: if the value has another type than the default, or is not one of the listed values.
        """
        if isinstance(self.default, bool) and not self.only_listed:
            return flag(options, self.peft, self.default)
        if isinstance(self.default, float):
            return options.number(self.peft, self.default)
        value = options.get(self.peft, self.default)  # the method's constructor checks integers
        for theirs, ours in self.values:
            if theirs == value:
                return ours
        if self.only_listed:
            *first, last = (str(v).lower() if isinstance(v, bool) else repr(v) for v, _ in self.values)
            raise FormatError(f"{self.peft}={value!r} is not supported: it must be {', '.join(first)} or {last}")
        return value


def written_options(table: Iterable[Option], method: object) -> dict[str, Any]:
    """Return PEFT's options for the arguments of ``method``."""
    return {option.peft: option.written(getattr(method, option.ours or option.peft)) for option in table}


def read_options(table: Iterable[Option], options: Options) -> dict[str, Any]:
    """Return our arguments for PEFT's ``options``.

    Raises:
        FormatError: if a value has another type than the option's default, or is not one of the listed values.
    """
    return {option.ours or option.peft: option.read(options) for option in table}


def flag(options: Options, option: str, default: bool = False) -> bool:
    """Return an option that must be true or false.

    Raises:
        FormatError: if it is neither.
    """
    value = options.get(option, default)
    if not isinstance(value, bool):
        raise FormatError(f"{option} must be true or false, got {value!r}")
    return value
