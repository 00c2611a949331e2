"""Convert MiSS to and from PEFT's ``peft_type`` MISS: one tensor per layer, ``miss_block``, with the same shape."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.formats.peft.converter import Options
from lightning_peft.formats.peft.layers import LayerConverter
from lightning_peft.formats.peft.option_table import Option, read_options
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.miss import MiSS

__all__ = ["MiSSConverter"]

#: PEFT's init_weights names the initialisation and the variant at once
_VARIANTS = ((True, "standard"), (False, "standard"), ("mini", "mini"), ("bat", "bat"))


class MiSSConverter(LayerConverter):
    """``peft_type`` MISS."""

    peft_type = "MISS"
    methods = (MiSS,)
    kinds = frozenset({"Linear"})
    table = (
        Option("r", 64),
        Option("miss_dropout", 0.0, "dropout"),
        Option("mini_r", 1),
        Option("init_weights", True, "variant", _VARIANTS, only_listed=True),
    )
    constants: ClassVar[dict[str, Any]] = {"bias": "none"}

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        given = read_options(self.table, options)
        if given["variant"] == "bat":
            given["dropout"] = 0.0  # PEFT stores it and never applies it
        return MiSS(**given, **arguments)
