"""This package's own adapters, where PEFT cannot say them: ``peft_type`` LIGHTNING_PEFT.

The same two files. ``adapter_config.json`` has the method's class and all of its arguments; the tensors are those of
the adapters, ``base_model.model.<weight or module>.adapters.<name in the adapter>``, and what trains of the base itself
under its plain name. What is loaded is exactly what was saved.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from lightning_peft.formats.converter import Converter, Options, Reading, Tensors, Writing
from lightning_peft.formats.files import FormatError
from lightning_peft.formats.names import PREFIX, Base
from lightning_peft.formats.snapshot import Snapshot
from lightning_peft.methods.callback import PEFTMethod, registered_method

__all__ = ["NATIVE", "NativeConverter"]

NATIVE = "LIGHTNING_PEFT"

#: arguments that only say how to start; a file's are not followed, since a tokenizer's name would be looked up
_START = {"init": "random", "init_text": None, "tokenizer": None}


class NativeConverter(Converter):
    """Any method of this package, and of users."""

    peft_type = NATIVE
    methods = ()

    def write(self, snapshot: Snapshot, **options: Any) -> Writing:
        method = snapshot.method
        tensors = {
            f"{PREFIX}{part.name}.adapters.{key}".replace("..", "."): tensor
            for part in snapshot.parts
            for key, tensor in part.tensors.items()
        }
        return Writing({"method": type(method).__name__, "config": method.config()}, tensors)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        method = _make(options.get("method"), options.get("config"), name)
        found: dict[str, dict[str, Tensor]] = {}
        for full in tensors.keys():  # noqa: SIM118
            where, _, key = f".{full.removeprefix(PREFIX)}".rpartition(".adapters.")
            if key:
                found.setdefault(where.removeprefix("."), {})[key] = tensors.take(full.removeprefix(PREFIX))
        return Reading(method, found)


def _make(kind: Any, config: Any, name: str) -> PEFTMethod:
    """The method of that class, looked up among those that are defined."""
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise FormatError(f"method must name a class and config hold its arguments, got {kind!r} and {config!r}")
    try:
        cls = registered_method(kind)
    except ValueError as error:
        near = difflib.get_close_matches(kind, str(error).split("'"), n=2)
        hint = f"; nearest: {near[-1]!r}" if len(near) > 1 else ""
        raise FormatError(f"method: {error}{hint}. A method of your own has to be imported first") from error
    if "tokenizer" in config:
        config = config | _START
    try:
        return cls(**{**config, "name": name})
    except TypeError as error:
        raise FormatError(f"config: {kind} takes other arguments: {error}") from error
