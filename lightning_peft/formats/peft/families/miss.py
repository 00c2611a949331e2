"""Convert MiSS to and from PEFT's ``peft_type`` MISS: one tensor per layer, ``miss_block``, with the same shape."""

from __future__ import annotations

from typing import Any, Literal

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import Options
from lightning_peft.formats.peft.layers import LayerConverter
from lightning_peft.formats.peft.option_table import Option, read_options, written_options
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.miss import MiSS

__all__ = ["MiSSConverter"]

#: PEFT's init_weights -> our variant; for PEFT the option names an initialisation and the variant at once
_VARIANTS: dict[bool | str, Literal["standard", "mini", "bat"]] = {
    True: "standard",
    False: "standard",
    "mini": "mini",
    "bat": "bat",
}


class MiSSConverter(LayerConverter):
    """``peft_type`` MISS."""

    peft_type = "MISS"
    methods = (MiSS,)
    kinds = frozenset({"Linear"})
    table = (Option("r", 64), Option("miss_dropout", 0.0, "dropout"), Option("mini_r", 1))

    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        method = snapshot.method
        assert isinstance(method, MiSS)
        init = True if method.variant == "standard" else method.variant
        return {**written_options(self.table, method), "init_weights": init, "bias": "none"}

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        init = options.get("init_weights", True)
        if init not in _VARIANTS:
            raise FormatError(f"init_weights={init!r} is not supported: it must be true, false, 'mini' or 'bat'")
        given = read_options(self.table, options)
        if _VARIANTS[init] == "bat":
            given["dropout"] = 0.0  # PEFT stores it and never applies it
        return MiSS(variant=_VARIANTS[init], **given, **arguments)
