"""Regular expressions out of files: tried in a process that can be stopped before this one uses them.

Python's ``re`` takes a time that is exponential in the length of some patterns, and nothing can stop it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_peft.formats.strict_json import FormatError

__all__ = ["check_regexes"]

LIMIT = 10.0  #: seconds for all patterns of a file on all names of a model

#: of PEFT's options: a string is a regular expression; a list holds them; the keys are
_STRINGS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_LISTS = ("layers_pattern", "modules_to_save")
_KEYS = ("rank_pattern", "alpha_pattern")

#: names, and alternatives of names as this package writes them: no choice to come back to
_PLAIN = re.compile(r"\^?(?:[\w.|-]|\\[.-])*")

#: the names stand between what PEFT and this package put around a pattern
_TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for i, pattern in enumerate(patterns):
    print(i, flush=True)
    for name in names:
        re.match(rf"(?:.*\.)?(?:{pattern})(?:\..*)?$", name)
"""


def check_regexes(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse an adapter whose patterns are none, or take long to be looked for in a model.

    Args:
        config: ``adapter_config.json``.
        names: all that the patterns may be looked for in.

    Raises:
        FormatError: names the pattern.
    """
    patterns = []
    for option, pattern in _regexes(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(f"{option}: {pattern[:200]!r} is no regular expression: {error}") from None
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
            "write a list of names, or fewer repeats inside of one another"
        ) from None


def _regexes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions of PEFT's options, and of our own behind ``re:``, each after its option's name."""
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


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _strings(inside)
