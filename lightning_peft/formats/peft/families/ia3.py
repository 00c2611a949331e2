"""Convert IA3 to and from PEFT's ``peft_type`` IA3.

| scale of | key after the module | shape |
|---|---|---|
| the output | ``ia3_l`` | (out, 1), of a convolution (1, out, 1, ...) |
| the input (``feedforward_modules``) | ``ia3_l`` | (1, in), of a convolution (1, in, 1, ...) |
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from lightning_peft.core.state.adapter_records import AdapterRecord
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import Options
from lightning_peft.formats.peft.layers import Layer, LayerConverter
from lightning_peft.formats.peft.targets import target_modules
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.ia3 import IA3, InputScale

__all__ = ["IA3Converter"]


class IA3Converter(LayerConverter):
    """``peft_type`` IA3."""

    peft_type = "IA3"
    methods = (IA3,)
    kinds = frozenset({"Linear", "Conv1D", "Conv"})
    dimensions = frozenset({2, 3})
    constants: ClassVar[dict[str, Any]] = {"init_ia3_weights": True}

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        if layer.kind != "Conv":
            return key, shape
        return key, (1, max(shape), *(1 for _ in layer.stored[2:]))

    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        at_input = [part.name for part in snapshot.adapter_records if _scales_input(part, snapshot)]
        others = [part.name for part in snapshot.adapter_records if part.name not in at_input]
        # PEFT matches feedforward_modules with str.endswith, so a name could also match the end of another name.
        clash = any(other.endswith(name) for other in others for name in at_input)
        targets = target_modules([*at_input, *others], snapshot.base)
        clash = clash or isinstance(targets, str)
        return {
            "target_modules": targets,
            "feedforward_modules": "|".join(map(re.escape, sorted(at_input))) if clash else sorted(at_input),
            **super().config(snapshot),
        }

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        patterns = options.get("feedforward_modules") or []
        at_input = [name for name in names if _is_feedforward(patterns, name)]
        arguments["targets"] = base.patterns(name for name in names if name not in at_input)
        return IA3(feedforward_targets=base.patterns(at_input), **arguments)


def _scales_input(part: AdapterRecord, snapshot: Snapshot) -> bool:
    host: Any = snapshot.base.module.get_submodule(part.host)
    return isinstance(host.adapters[snapshot.method.name].weights()[part.parameter], InputScale)


def _is_feedforward(patterns: str | list[str], name: str) -> bool:
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, name) is not None
    return any(name.endswith(pattern) for pattern in patterns)
