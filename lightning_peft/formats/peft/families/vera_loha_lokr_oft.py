"""Convert VeRA, LoHa, LoKr and OFT to and from PEFT's ``peft_type`` VERA, LOHA, LOKR and OFT.

| method | keys after the module | where the shape differs from ours |
|---|---|---|
| VeRA | ``vera_lambda_d``, ``vera_lambda_b``; once ``base_model.vera_A``, ``base_model.vera_B`` | |
| LoHa | ``hada_w1_a`` ... ``hada_w2_b``, ``hada_t1``, ``hada_t2`` | Conv1d: t (r, r, kernel, 1) |
| LoKr | ``lokr_w1`` or ``lokr_w1_a``, ``lokr_w1_b``; w2 likewise; ``lokr_t2`` | convolution: w2 (k, n, *kernel) |
| OFT | ``oft_R.weight``, of an embedding ``oft_embedding_R.weight`` | |
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import NotInPeftError, Options
from lightning_peft.formats.peft.layers import Layer, LayerConverter
from lightning_peft.formats.peft.option_table import Option
from lightning_peft.formats.peft.patterns import RankOptions, clean, rank_arguments
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.vera import VeRA

__all__ = ["LoHaConverter", "LoKrConverter", "OFTConverter", "VeRAConverter"]


class VeRAConverter(LayerConverter):
    """``peft_type`` VERA. If the file does not have the projections, PEFT and this package draw the same ones."""

    peft_type = "VERA"
    methods = (VeRA,)
    has_rank = True
    kinds = frozenset({"Linear", "Conv1D"})
    shared = {"projection.vera_A": "base_model.vera_A", "projection.vera_B": "base_model.vera_B"}
    not_in_peft = frozenset({"projection.sample"})
    table = (
        Option("r", 256),
        Option("vera_dropout", 0.0, "dropout"),
        Option("d_initial", 0.1),
        Option("projection_prng_key", 0, "projection_seed"),
        Option("save_projection", True),
    )
    constants: ClassVar[dict[str, Any]] = {"bias": "none", "init_weights": True}


_RANKS = RankOptions()


class _FactorConverter(LayerConverter):
    """The common part of LoHa and LoKr: ranks and scales by pattern, and shapes that depend on the kernel."""

    kinds = frozenset({"Linear", "Conv"})
    dimensions = frozenset({1, 2})
    table: ClassVar[tuple[Option, ...]] = (
        Option("rank_dropout", 0.0),
        Option("module_dropout", 0.0),
        Option("use_effective_conv2d", False),
    )

    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        values = {
            part.name: (part.facts["r"], clean(part.facts["scale"] * part.facts["r"]))
            for part in snapshot.adapter_records
        }
        return {**_RANKS.written(values), **super().config(snapshot)}

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        found = _RANKS.read(options)
        values = {name: found.at(name) for name in names}
        return super().method(options, names, base, **rank_arguments(values, base, found.default), **arguments)

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        if key in ("hada_t1", "hada_t2", "lokr_t2"):
            return key, shape if len(shape) == 4 else (*shape, 1)
        if key == "lokr_w2" and layer.kind == "Conv":
            kernel = layer.stored[2:]
            return key, (shape[0], shape[1] // math.prod(kernel), *kernel)
        return key, shape


class LoHaConverter(_FactorConverter):
    """``peft_type`` LOHA."""

    peft_type = "LOHA"
    methods = (LoHa,)
    has_rank = True

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        return super().method(options, names, base, rank_dropout_scale=True, **arguments)


class LoKrConverter(_FactorConverter):
    """``peft_type`` LOKR.

    PEFT multiplies the full second factor of a Conv1d along other dimensions, so this case is not converted.
    """

    peft_type = "LOKR"
    methods = (LoKr,)
    table = (
        *_FactorConverter.table,
        Option("decompose_both", False),
        Option("decompose_factor", -1),
        Option("rank_dropout_scale", False),
    )

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        whole = shape == (layer.stored[0], math.prod(layer.stored[1:]))  # the first factor is then 1 x 1
        if key == "lokr_w2" and len(layer.stored) == 3 and not whole:
            raise NotInPeftError(
                f"PEFT's LOKR on a Conv1d does not compute the Kronecker product if the second factor is full: set r "
                f"below half of {max(shape[0], shape[1] // layer.stored[2])} at {layer.name!r}"
            )
        return super().place(key, shape, layer)


class OFTConverter(LayerConverter):
    """``peft_type`` OFT.

    On a convolution, PEFT's forward and merge agree only for a kernel of size 1, so only this case is converted. With
    ``coft``, PEFT and this package project the entries onto the same ball in each forward.
    """

    peft_type = "OFT"
    methods = (OFT,)
    table = (
        Option("r", 0, values=((0, None),)),
        Option("oft_block_size", 32, "block_size", values=((0, None),)),
        Option("num_cayley_neumann_terms", 5, values=((4, 4), (3, 4))),  # PEFT computes 3 with four terms
        Option("module_dropout", 0.0, "dropout"),
        Option("block_share", False),
        Option("use_cayley_neumann", True),
        Option("coft", False),
        Option("eps", 6e-5),
    )
    constants: ClassVar[dict[str, Any]] = {"bias": "none", "init_weights": True}
    kinds = frozenset({"Linear", "Embedding", "Conv"})
    dimensions = frozenset({2})

    def check(self, layer: Layer) -> None:
        super().check(layer)
        if layer.kind == "Conv" and (layer.stored[2:] != (1, 1) or layer.host.groups > 1):
            raise NotInPeftError(
                f"PEFT's OFT on a convolution gives different outputs before and after merging, unless the kernel has "
                f"size 1 and there is one group: {layer.name!r} has weight shape {'x'.join(map(str, layer.stored))}"
            )

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        return "oft_embedding_R.weight" if layer.kind == "Embedding" else "oft_R.weight", shape

    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        method = snapshot.method
        assert isinstance(method, OFT)
        if method.use_cayley_neumann and method.num_cayley_neumann_terms == 3:
            raise NotInPeftError("PEFT's OFT computes num_cayley_neumann_terms=3 with four terms: set it to 2 or 4")
        default = {} if method.r or method.block_size else {"oft_block_size": 32}
        return {**super().config(snapshot), **default}

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        if options.get("oft_block_size") is None:
            raise FormatError(
                "oft_block_size is missing: PEFT before 0.14 computed OFT differently. Train it with a newer PEFT"
            )
        return super().method(options, names, base, **arguments)
