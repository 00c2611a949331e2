"""Rewrite the Python in error messages as flags, for the commands whose classes are built from flags."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_peft.cli.methods import exported
from lightning_peft.trainer.checkpoints.hyperparameters import parameters_of

__all__ = ["in_flags"]

#: a list, a dictionary, a string, or a word
_VALUE = r"\[[^\]]*\]|\{[^}]*\}|'[^']*'|\"[^\"]*\"|\.\.\.|-?\w[\w.\-/]*(?<![.])"
_ARGUMENT = re.compile(rf"(?<![\w.\-])(\w+)=({_VALUE})")
_METHOD = re.compile(r"\blp\.(\w+)(\(([^()]*)\))?")
_CALL = re.compile(r"[\w.]+\([^()]*\)")
_WORDS = {"True": "true", "False": "false", "None": "null"}


def in_flags(message: str, owners: Mapping[str, type] | None = None) -> str:
    """Return ``message`` with ``lp.LoRA(r=8)`` as ``--method LoRA --method.r=8`` and ``targets=["q"]`` as a flag.

    Calls of other functions are not changed, nor are arguments that none or several of the classes have.

    Args:
        message: an error message that gives advice in Python.
        owners: the class behind the flags with each prefix, such as ``{"method": lp.LoRA, "trainer": L.Trainer}``.
    """
    named = {prefix: parameters_of(owner).keys() for prefix, owner in (owners or {}).items()}
    text = _METHOD.sub(_method, message)
    parts, end = [], 0
    for call in _CALL.finditer(text):
        parts += [_arguments(text[end : call.start()], named), call[0]]
        end = call.end()
    return "".join([*parts, _arguments(text[end:], named)])


def _method(found: re.Match[str]) -> str:
    if found[1] not in {method.__name__ for method in exported()}:
        return found[0]
    return " ".join([f"--method {found[1]}", *(_flag("method", *given) for given in _ARGUMENT.findall(found[3] or ""))])


def _arguments(text: str, named: Mapping[str, object]) -> str:
    def flag(found: re.Match[str]) -> str:
        having = [prefix for prefix, names in named.items() if found[1] in names]  # type: ignore[operator]
        return _flag(having[0], found[1], found[2]) if len(having) == 1 else found[0]

    return _ARGUMENT.sub(flag, text)


def _flag(prefix: str, name: str, value: str) -> str:
    plain = re.sub(r"""['"]([\w.*\-]+)['"]""", r"\1", value)  # YAML needs no quotes around these
    return f"--{prefix}.{name}={_WORDS.get(plain, plain).replace(', ', ',')}"
