"""JSON out of files that need not be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

__all__ = ["FormatError", "parse_json"]

MAX_DEPTH = 32  #: lists and objects inside one another


class FormatError(ValueError):
    """Files that are no adapter this package reads, or that cannot be trusted, and why."""


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``: no key twice, no NaN, not too deep.

    Raises:
        FormatError: it is none; ``where`` says what was read.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{where} names {key[:80]!r} twice")
            found[key] = value
        return found

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise FormatError(f"{where} holds the number {number}")
        return float(number)

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except FormatError:
        raise
    except ValueError as error:  # no UTF-8, no JSON, an integer of thousands of digits
        raise FormatError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{where} is a JSON {type(found).__name__}; an object was expected")
    if any(depth > MAX_DEPTH for depth in _depths(found)):
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return found


def _depths(value: Any) -> Iterator[int]:
    stack = [(value, 1)]
    while stack:
        value, depth = stack.pop()
        yield depth
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        stack += [(v, depth + 1) for v in inside if isinstance(v, dict | list)]
