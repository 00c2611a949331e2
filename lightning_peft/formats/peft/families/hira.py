"""Convert HiRA to and from PEFT's ``peft_type`` HIRA.

| layer | keys after the module | where the shape differs from ours |
|---|---|---|
| Linear, Conv1D | ``hira_A``, ``hira_B`` | |
| Embedding | ``hira_embedding_A``, ``hira_embedding_B`` | |
| Conv1d, Conv2d, Conv3d | ``hira_A``, ``hira_B`` | (r, in, *kernel) and (out, r, 1, ...) |
"""

from __future__ import annotations

from typing import Any

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import NotInPeftError, Options
from lightning_peft.formats.peft.layers import Layer, LayerConverter
from lightning_peft.formats.peft.option_table import Option
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.hira import HiRA

__all__ = ["HiRAConverter"]


class HiRAConverter(LayerConverter):
    """``peft_type`` HIRA."""

    peft_type = "HIRA"
    methods = (HiRA,)
    has_rank = True
    kinds = frozenset({"Linear", "Conv1D", "Embedding", "Conv"})
    dimensions = frozenset({1, 2, 3})
    table = (
        Option("r", 32),
        Option("hira_dropout", 0.0, "dropout"),
    )

    def check(self, layer: Layer) -> None:
        super().check(layer)
        if layer.kind == "Conv" and layer.host.groups > 1:
            raise NotInPeftError(f"PEFT's HIRA does not adapt convolutions with groups, such as {layer.name!r}")

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        if layer.kind == "Embedding":
            return key.replace("hira_", "hira_embedding_"), shape
        if layer.kind == "Conv":
            kernel = layer.stored[2:]
            return key, (shape[0], *layer.stored[1:]) if key == "hira_A" else (*shape, *[1] * len(kernel))
        return key, shape

    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        ranks = {part.facts["r"] for part in snapshot.adapter_records}
        if len(ranks) > 1:
            raise NotInPeftError("PEFT's HIRA stores rank_pattern and does not apply it: use one r for all layers")
        return {**super().config(snapshot), "r": ranks.pop()}

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        options.ignore("rank_pattern")  # PEFT stores it and does not apply it
        return super().method(options, names, base, **arguments)
