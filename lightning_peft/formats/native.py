"""This package's own adapters, where PEFT cannot say them: ``peft_type`` LIGHTNING_PEFT.

The same two files. ``adapter_config.json`` has the method's class and all of its arguments, with patterns as the base's
names are without a LightningModule around it. The tensors are those of the adapters,
``base_model.model.<weight or module>.adapters.<name in the adapter>``, and what trains of the base itself under its
plain name. What is loaded is exactly what was saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import is_adapter_key, join
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.patterns import match
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, Converter, Options, Reading, Tensors, Writing
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["NATIVE", "NativeConverter"]

NATIVE = "LIGHTNING_PEFT"

#: arguments that hold patterns; in the last two they are keys
_PATTERNS = ("targets", "exclude", "trainable", "feedforward_targets", "rank_pattern", "alpha_pattern")


class NativeConverter(Converter):
    """Any method of this package, and of users."""

    peft_type = NATIVE
    methods = ()

    def write(self, snapshot: Snapshot, **options: Any) -> Writing:
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
    """The method of that class, looked up among those that are defined."""
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise FormatError(f"method must name a class and config hold its arguments, got {kind!r} and {config!r}")

    def outer(pattern: str) -> str:
        if pattern.startswith("re:"):
            return f"re:(?:{re.escape(base.name)}\\.)?(?:{pattern[3:]})"
        meant = {base.outer(n) for n in _named(base.module, pattern)}
        return pattern if meant == _named(base.root, pattern) else _exactly(meant) or pattern

    try:
        config = _with_patterns(config, outer) if base.name else config
        return method_of_file(kind, {**config, "name": name})
    except (TypeError, ValueError) as error:
        raise FormatError(f"{kind} cannot be made as the file says: {error}") from error


def _named(module: nn.Module, pattern: str) -> set[str]:
    """The modules and parameters that a pattern means by their names."""
    if pattern.startswith("type:"):
        return set()
    parameters = {name: None for name, _ in module.named_parameters() if not is_adapter_key(name)}
    return {name for name in (*dict(base_modules(module)), *parameters) if name and match(pattern, name)}


def _exactly(names: Collection[str | None]) -> str | None:
    """A pattern for these names and no others; None where one has no name."""
    if not names or None in names:
        return None
    return f"re:{'|'.join(sorted(re.escape(str(name)) for name in names))}"


def _with_patterns(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """``config`` with every pattern in it changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(pattern): v for pattern, v in value.items()}
        return [change(v) for v in value] if isinstance(value, list | tuple) else value

    return {key: changed(value) if key in _PATTERNS else value for key, value in config.items()}
