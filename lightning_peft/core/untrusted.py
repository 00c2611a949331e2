"""Read untrusted files safely: strict JSON, regular expressions with a time limit, bounded allocations.

Python's ``re`` can need time that is exponential in the length of a pattern, and a match cannot be interrupted. So
patterns from files are first tried in a separate process, which can be killed.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["AllocationLimit", "FormatError", "check_regexes", "limits_of", "parse_json"]

MAX_DEPTH = 32  #: levels of nested lists and objects


class FormatError(ValueError):
    """The files are not an adapter that this package can read, or they are not safe to read."""


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in ``data``, without duplicate keys, NaN or deep nesting.

    Raises:
        FormatError: if ``data`` is anything else; ``where`` is the file's name in the message.
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
    except ValueError as error:  # not UTF-8, not JSON, or an integer with thousands of digits
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{where} is a JSON {type(found).__name__}; an object was expected")
    if any(depth > MAX_DEPTH for depth in _depths(found)):
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return found


def _depths(value: object) -> Iterator[int]:
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        value, depth = stack.pop()
        yield depth
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        stack += [(v, depth + 1) for v in inside if isinstance(v, dict | list)]


LIMIT = 10.0  #: seconds for all patterns of a file on all names of a model
# PEFT's options that hold regular expressions: as a string, as entries of a list, and as keys of a mapping.
_STRINGS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_LISTS = ("layers_pattern", "modules_to_save")
_KEYS = ("rank_pattern", "alpha_pattern")
#: names, and alternatives of names as this package writes them; these cannot backtrack, so they need no trial
_PLAIN = re.compile(r"\^?(?:[\w.|-]|\\[.-])*")
#: the program that the separate process runs; patterns are wrapped as PEFT and this package wrap them
_TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for i, pattern in enumerate(patterns):
    print(i, flush=True)
    for name in names:
        re.match(rf"(?:.*\.)?(?:{pattern})(?:\..*)?$", name)
"""


def check_regexes(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse an adapter with invalid regular expressions, or with some that take too long on a model's names.

    Args:
        config: the content of ``adapter_config.json``.
        names: the names that the patterns will be matched with.

    Raises:
        FormatError: if there is such a pattern; the message names it.
    """
    patterns = []
    for option, pattern in _regexes(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(f"{option}: {pattern[:200]!r} is not a valid regular expression: {error}") from None
        if not _PLAIN.fullmatch(pattern):
            patterns.append(pattern)
    if not patterns:
        return
    given = json.dumps([patterns, list(names)])
    try:
        subprocess.run([sys.executable, "-ISc", _TRY], input=given.encode(), capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as stopped:
        pattern = patterns[int((stopped.output or b"0").split()[-1])]
        raise FormatError(
            f"the regular expression {pattern[:200]!r} takes more than {LIMIT:g} seconds on the names of this model: "
            "write a list of names, or avoid nested repetition"
        ) from None


def _regexes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (option, pattern) for the regular expressions in PEFT's options, and in ours after ``re:``."""
    for option in _STRINGS:
        if isinstance(config.get(option), str):
            yield option, config[option]
    for option in _LISTS:
        if isinstance(config.get(option), list):
            yield from ((option, entry) for entry in config[option] if isinstance(entry, str))
    for option in _KEYS:
        if isinstance(config.get(option), dict):
            yield from ((option, pattern) for pattern in config[option])
    yield from (("config", text[3:]) for text in _strings(config.get("config")) if text.startswith("re:"))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _strings(inside)


class AllocationLimit(TorchDispatchMode):
    """Inside the context, creating a tensor that is much larger than any in the model and the file is an error.

    The configuration of a file determines the size of the adapters, which are created before their shapes are
    compared with the file's tensors. A hostile configuration could exhaust the memory.

    Args:
        parameters: the parameters of the model that the adapter is for.
        tensors: the tensors in the file.
    """

    def __init__(self, parameters: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        known = (*parameters, *(t for t in tensors.values() if isinstance(t, Tensor)))
        self.most = 4 * max((t.numel() for t in known), default=0) + 2**20

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and not isinstance(args[0], Tensor):  # a factory function such as empty(size)
            sizes = [math.prod(arg) if _is_size(arg) else arg for arg in args]
            wanted = max((size for size in sizes if isinstance(size, int)), default=0)
            if wanted > self.most:
                raise FormatError(
                    f"the configuration asks for a tensor of {wanted:,} values, which is far larger than any tensor in "
                    "the file or the model"
                )
        return func(*args, **(kwargs or {}))


def limits_of(config: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]) -> AllocationLimit:
    """Check the patterns of a method from a file, and return the limit of what its plan for ``model`` can allocate.

    Args:
        config: the method's configuration.
        model: the model to adapt.
        tensors: the tensors in the file.

    Raises:
        FormatError: if a pattern is invalid, or takes too long on the names of the model.
    """
    check_regexes({"config": config}, [name for name, _ in (*model.named_modules(), *model.named_parameters())])
    return AllocationLimit(model.parameters(), tensors)


def _is_size(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and all(isinstance(side, int) for side in value)
