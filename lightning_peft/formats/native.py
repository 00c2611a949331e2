"""The format for adapters that PEFT cannot represent: ``peft_type`` LIGHTNING_PEFT, in the same two files.

``adapter_config.json`` has the class name and all arguments of the method. Patterns are written relative to the base,
without the name it has inside a LightningModule. The adapters' tensors are called
``base_model.model.<weight or module>.adapters.<name in the adapter>``; trained parameters of the base keep their names.
Saving and loading is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.base_modules import base_modules, base_parameters
from lightning_peft.core.targeting.patterns import match
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, Converter, Options, Reading, Tensors, Writing
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["NATIVE", "NativeConverter"]

NATIVE = "LIGHTNING_PEFT"

#: arguments that hold patterns; the last two are dictionaries with patterns as keys
_PATTERNS = ("targets", "exclude", "trainable", "feedforward_targets", "rank_pattern", "alpha_pattern")


class NativeConverter(Converter):
    """Converter for any method, including methods that users define."""

    peft_type = NATIVE
    methods = ()

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        method, name = snapshot.method, snapshot.base.name
        tensors = {
            PREFIX + join(part.name, "adapters", key): tensor
            for part in snapshot.adapter_records
            for key, tensor in part.tensors.items()
        }

        base = snapshot.base

        def inner(pattern: str) -> str:
            if pattern.startswith("re:"):
                return f"re:{pattern[3:].removeprefix(re.escape(name) + re.escape('.'))}"
            # Without the prefix, a suffix pattern could match more names. It is kept only if it matches the same ones.
            short = pattern.removeprefix(f"{name}.")
            meant = {base.inner(n) for n in _named(base.root, pattern)}
            return short if meant == _named(base.module, short) else _exactly(meant) or short

        config = _with_patterns(method.config(), inner) if name else method.config()
        return Writing({"method": type(method).__name__, "config": config}, tensors)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        options.ignore("reason")
        method = _make(options.get("method"), options.get("config"), base, name)
        found: dict[str, dict[str, Tensor]] = {}
        for full in tensors.keys():  # noqa: SIM118
            where, _, key = f".{full.removeprefix(PREFIX)}".rpartition(".adapters.")
            if key and full.startswith(PREFIX):
                found.setdefault(where.removeprefix("."), {})[key] = tensors.take(full.removeprefix(PREFIX))
        return Reading(method, found)


def _make(kind: Any, config: Any, base: Base, name: str) -> PEFTMethod:
    """Build the method of class ``kind``, which is looked up among the defined methods and never imported."""
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise FormatError(f"method must be a class name and config a dictionary of arguments, got {kind!r}, {config!r}")

    def outer(pattern: str) -> str:
        if pattern.startswith("re:"):
            return f"re:(?:{re.escape(base.name)}\\.)?(?:{pattern[3:]})"
        meant = {base.outer(n) for n in _named(base.module, pattern)}
        return pattern if meant == _named(base.root, pattern) else _exactly(meant) or pattern

    try:
        config = _with_patterns(config, outer) if base.name else config
        return method_of_file(kind, {**config, "name": name})
    except (TypeError, ValueError) as error:
        raise FormatError(f"{kind} does not accept the arguments in the file: {error}") from error


def _named(module: nn.Module, pattern: str) -> set[str]:
    """The names of the modules and parameters that a pattern matches by name."""
    if pattern.startswith("type:"):
        return set()
    parameters = {name: None for name, _ in base_parameters(module)}
    return {name for name in (*dict(base_modules(module)), *parameters) if name and match(pattern, name)}


def _exactly(names: Collection[str | None]) -> str | None:
    """A pattern that matches exactly these names; None if there are none, or if one of them is None."""
    if not names or None in names:
        return None
    return f"re:{'|'.join(sorted(re.escape(str(name)) for name in names))}"


def _with_patterns(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a copy of ``config`` with ``change`` applied to every pattern in it."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(pattern): v for pattern, v in value.items()}
        return [change(v) for v in value] if isinstance(value, list | tuple) else value

    return {key: changed(value) if key in _PATTERNS else value for key, value in config.items()}
