"""Convert LoRA's tensors to and from PEFT's, for every kind of weight.

| weight | keys after the module | shapes |
|---|---|---|
| Linear, Conv1D | ``lora_A.weight``, ``lora_B.weight``, ``lora_B.bias`` | (r, in), (out, r), (out) |
| convolution | the same | (r, in, *kernel), (out, r / groups, 1, ...), (out) |
| Embedding | ``lora_embedding_A``, ``lora_embedding_B`` | (r, vocabulary), (dim, r) |
| attention | ``lora_A.weight``, ...; ``base_layer.out_proj.lora_A.weight``, ... | (r, in), (out, r) |
| parameter | ``lora_A.weight``, ...; after a ``base_layer.`` for each later one | (experts r, in), (out, r experts) |
| DoRA | ``lora_magnitude_vector`` | (out), of a convolution (1, out, 1, ...) |

For a grouped convolution, PEFT's A reads all channels and ours only those of one group: it is written as one A per
group, with zeros elsewhere. PEFT adapts either both projections of an attention or neither, so a missing one is written
as zeros. Its forward adds the change of ``out_proj`` twice, so half of that change is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.core.names import join
from lightning_peft.core.state.adapter_records import AdapterRecord, layer_facts, layer_kind
from lightning_peft.core.targeting.layouts import EmbeddingLayout, TransposedLayout
from lightning_peft.core.targeting.sites import Site
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.peft.converter import PREFIX, NotInPeftError, Tensors
from lightning_peft.methods.lora import plain_factors

__all__ = ["Entry", "entries", "take_attention", "take_layer", "take_parameter", "within_rank"]


#: kinds of layers, as AdapterRecord names them, that PEFT does not adapt
NOT_IN_PEFT = frozenset({"ConvTranspose", "OtherTransposed", "Recurrent"})


@dataclass
class Entry:
    """A module or bare parameter with its own rank and alpha in PEFT.

    Attributes:
        name: The name of the module, or of the bare parameter.
        r: The rank.
        scale: The factor of the product B A.
        tensors: PEFT's full key -> tensor.
        is_parameter: Whether it is a parameter, not a module.
    """

    name: str
    r: int
    scale: float
    tensors: dict[str, Tensor]
    is_parameter: bool = False


@dataclass
class _Pair:
    """A (..., r, in) and B (..., out, r) of one weight, and the scale of their product."""

    part: AdapterRecord
    a: Tensor
    b: Tensor
    scale: float

    @classmethod
    def of(cls, part: AdapterRecord) -> _Pair:
        own = part.tensors
        a, b = plain_factors(own["lora_A"], own["lora_B"], own.get("lora_A0"), own.get("lora_B0"))
        return cls(part, a, b, part.facts["scale"])

    @property
    def r(self) -> int:
        return self.a.shape[-2]

    def widened(self, r: int, scale: float) -> _Pair:
        """The same change with rank ``r``, padded with zeros, and with another scale."""
        a, b = F.pad(self.a, (0, 0, 0, r - self.r)), F.pad(self.b, (0, r - self.r))
        return _Pair(self.part, a, b * (self.scale / scale), scale)


def entries(records: Iterable[AdapterRecord], fold_scale: bool = False) -> Iterator[Entry]:
    """Return PEFT's tensors for LoRA's adapters.

    Args:
        records: The adapter records; those of one module must be adjacent.
        fold_scale: Multiply B by the scale, and set the scale to 1.

    Raises:
        NotInPeftError: if PEFT cannot run one of the layers.
    """
    for host, group in groupby(map(_Pair.of, records), key=lambda pair: pair.part.host):
        pairs = list(group)
        if fold_scale:
            pairs = [_Pair(pair.part, pair.a, pair.b * pair.scale, 1.0) for pair in pairs]
        if not host:
            raise NotInPeftError("PEFT cannot adapt parameters of the model itself, only those of modules in it")
        kind = pairs[0].part.kind
        if kind in NOT_IN_PEFT:
            raise NotInPeftError(f"PEFT's LoRA does not adapt weights like {pairs[0].part.name!r} ({kind})")
        if kind == "Attention":
            yield _attention(host, pairs)
        elif kind in ("OtherLinear", "Parameter"):
            yield from _parameters(host, pairs)
        else:
            yield _layer(host, pairs[0])


def _layer(host: str, pair: _Pair) -> Entry:
    part, key = pair.part, f"{PREFIX}{host}"
    if part.facts.get("own_forward"):
        raise NotInPeftError(
            f"{host!r} overrides the forward of its class, and PEFT would add its change outside that forward"
        )
    if part.kind == "Embedding":
        tensors = {f"{key}.lora_embedding_A": pair.a, f"{key}.lora_embedding_B": pair.b}
    else:
        if part.kind == "Conv":
            pair = _convolution(host, pair)
        tensors = {f"{key}.lora_A.weight": pair.a, f"{key}.lora_B.weight": pair.b}
    if "magnitude" in part.tensors:
        magnitude = part.tensors["magnitude"]
        shape = (1, -1, *[1] * (len(part.shape) - 2)) if part.kind == "Conv" else (-1,)
        tensors[f"{key}.lora_magnitude_vector"] = magnitude.view(shape)
    if "lora_bias" in part.tensors:
        scaled = part.facts["scale"] / pair.scale
        tensors[f"{key}.lora_B.bias"] = part.tensors["lora_bias"] * scaled
    return Entry(host, len(pair.a), pair.scale, tensors)


def _convolution(host: str, pair: _Pair) -> _Pair:
    facts, (rows, channels, *kernel) = pair.part.facts, pair.part.shape
    if facts["padding_mode"] != "zeros" or set(facts["dilation"]) != {1}:
        raise NotInPeftError(
            f"{host!r} has dilation {facts['dilation']} and padding_mode {facts['padding_mode']!r}, and PEFT's LoRA of "
            "a convolution ignores both"
        )
    a, groups = pair.a.view(pair.r, channels, *kernel), facts["groups"]
    if groups > 1:
        if "magnitude" in pair.part.tensors:
            raise NotInPeftError(f"{host!r} has {groups} groups, and PEFT's DoRA fails on grouped convolutions")
        whole = a.new_zeros(groups * pair.r, groups * channels, *kernel)
        for g in range(groups):
            whole[g * pair.r : (g + 1) * pair.r, g * channels : (g + 1) * channels] = a
        a = whole
    return _Pair(pair.part, a, pair.b.view(rows, pair.r, *[1] * len(kernel)), pair.scale)


def _attention(host: str, pairs: list[_Pair]) -> Entry:
    by = {pair.part.parameter: pair for pair in pairs}
    if not by.keys() <= {"in_proj_weight", "out_proj.weight"}:
        raise NotInPeftError(f"{host!r} has queries, keys and values of different widths, which PEFT does not adapt")
    if any("magnitude" in pair.part.tensors or "lora_bias" in pair.part.tensors for pair in pairs):
        raise NotInPeftError(f"{host!r} is a MultiheadAttention, on which PEFT does not support DoRA or lora_bias")
    r, scale, width = max(pair.r for pair in pairs), pairs[0].scale, pairs[0].a.shape[-1]
    tensors: dict[str, Tensor] = {}
    for parameter, inside, rows, share in (
        ("in_proj_weight", "", 3 * width, 1.0),
        ("out_proj.weight", ".base_layer.out_proj", width, 0.5),
    ):
        key = f"{PREFIX}{host}{inside}"
        like = pairs[0].a
        a, b = like.new_zeros(r, width), like.new_zeros(rows, r)
        if parameter in by:
            pair = by[parameter].widened(r, scale)
            a, b = pair.a, pair.b * share
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    return Entry(host, r, scale, tensors)


def _parameters(host: str, pairs: list[_Pair]) -> Iterator[Entry]:
    for outside, pair in zip(reversed(range(len(pairs))), pairs):
        if "magnitude" in pair.part.tensors:
            raise NotInPeftError(f"{pair.part.name!r} is a bare parameter, on which PEFT does not support DoRA")
        # PEFT wraps the module once per adapted parameter; the wrappers of later parameters enclose those of earlier
        # ones.
        key = f"{PREFIX}{host}" + ".base_layer" * outside
        a, b = pair.a, pair.b
        if pair.part.facts.get("is_transposed") and a.ndim == 3:
            a, b = b.mT, a.mT
        if a.ndim == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        yield Entry(join(host, pair.part.parameter), pair.r, pair.scale, tensors, is_parameter=True)


def take_layer(tensors: Tensors, site: Site, r: int, dora: bool, bias: bool) -> dict[str, Tensor]:
    """Take our tensors for a layer.

    Raises:
        FormatError: if one is missing or misshapen, or if PEFT's LoRA gives a different result on this layer.
    """
    rows, columns = site.shape
    name, kind = site.name, layer_kind(site.module, site.layout)
    if kind in NOT_IN_PEFT:
        raise FormatError(f"PEFT's LoRA does not adapt weights like {name!r} ({kind}), so this file was edited")
    if layer_facts(site.module, site.layout).get("own_forward"):
        raise FormatError(
            f"{name!r} overrides the forward of its class, and PEFT adds its change outside that forward: the output "
            "here would differ from PEFT's"
        )
    if kind == "Embedding":
        a = tensors.take(f"{name}.lora_embedding_A", (r, columns))
        b = tensors.take(f"{name}.lora_embedding_B", (rows, r))
    elif kind == "Conv":
        a, b = _take_convolution(tensors, site, r)
    else:
        a, b = tensors.take(f"{name}.lora_A.weight", (r, columns)), tensors.take(f"{name}.lora_B.weight", (rows, r))
    taken = {"lora_A": a, "lora_B": b}
    if dora:
        shape = (1, rows, *[1] * (site.weight.ndim - 2)) if kind == "Conv" else (rows,)
        taken["magnitude"] = tensors.take(f"{name}.lora_magnitude_vector", shape).view(-1)
    if bias:
        taken["lora_bias"] = tensors.take(f"{name}.lora_B.bias", (rows,))
    return taken


def _take_convolution(tensors: Tensors, site: Site, r: int) -> tuple[Tensor, Tensor]:
    module, (rows, channels, *kernel) = site.module, site.weight.shape
    if module.padding_mode != "zeros" or set(module.dilation) != {1}:  # type: ignore[arg-type]
        raise FormatError(
            f"{site.name!r} has dilation {module.dilation} and padding_mode {module.padding_mode!r}, and PEFT's LoRA "
            "of a convolution ignores both in its forward: the output here would differ from PEFT's"
        )
    groups = int(module.groups)  # type: ignore[arg-type]
    if r % groups:
        raise FormatError(f"{site.name!r} has {groups} groups, which do not divide r={r}: PEFT cannot have trained it")
    a = tensors.take(f"{site.name}.lora_A.weight", (r, channels * groups, *kernel))
    b = tensors.take(f"{site.name}.lora_B.weight", (rows, r // groups, *[1] * len(kernel))).flatten(1)
    if groups == 1:
        return a.flatten(1), b
    own = [block[:, g * channels : (g + 1) * channels] for g, block in enumerate(a.chunk(groups))]
    if a.count_nonzero() != torch.cat(own).count_nonzero():
        raise FormatError(
            f"{site.name!r} has {groups} groups, but its lora_A mixes channels of different groups, which no change of "
            "the grouped weight can represent"
        )
    # This package writes the same A for each group, which needs rank r only; other files need a block-diagonal B.
    if all(torch.equal(own[0], block) for block in own):
        return own[0].flatten(1), b
    return torch.cat(own).flatten(1), torch.block_diag(*b.chunk(groups))


def take_attention(tensors: Tensors, name: str, sites: dict[str, Site], r: int) -> dict[str, dict[str, Tensor]]:
    """Take our tensors for the projections of an ``nn.MultiheadAttention``, by the site's name.

    Raises:
        FormatError: if one is missing or misshapen.
    """
    found = {}
    for site, inside, times in (
        (sites[f"{name}.in_proj_weight"], "", 1.0),
        (sites[f"{name}.out_proj"], ".base_layer.out_proj", 2.0),
    ):
        rows, columns = site.shape
        a = tensors.take(f"{name}{inside}.lora_A.weight", (r, columns))
        b = tensors.take(f"{name}{inside}.lora_B.weight", (rows, r))
        found[site.name] = {"lora_A": a, "lora_B": b * times}
    return found


def take_parameter(tensors: Tensors, site: Site, outside: int, r: int) -> dict[str, Tensor]:
    """Take our tensors for a bare parameter.

    Args:
        tensors: The file's tensors.
        site: The parameter.
        outside: The number of adapted parameters of the same module that come after it; PEFT nests one wrapper each.
        r: The rank.

    Raises:
        FormatError: if one is missing or misshapen.
    """
    key = site.host + ".base_layer" * outside
    stored = site.weight
    experts = len(stored) if stored.ndim == 3 else 1
    transposed = getattr(site.module, "is_transposed", False) if stored.ndim == 3 else False
    rows, columns = stored.shape[-2:] if not transposed else reversed(stored.shape[-2:])
    a = tensors.take(f"{key}.lora_A.weight", (experts * r, columns))
    b = tensors.take(f"{key}.lora_B.weight", (rows, r * experts))
    if stored.ndim == 3:
        a, b = a.view(experts, r, columns), b.view(rows, r, experts).permute(2, 0, 1)
    # PEFT's product changes the weight as it is stored, ours the matrix that the weight is presented as.
    if transposed or isinstance(site.layout, TransposedLayout | EmbeddingLayout):
        a, b = b.mT, a.mT
    return {"lora_A": a.contiguous(), "lora_B": b.contiguous()}


def within_rank(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same product with a smaller rank, if r is larger than both sides of the matrix."""
    a, b = pair["lora_A"], pair["lora_B"]
    rows, columns = b.shape[-2], a.shape[-1]
    if a.shape[-2] <= max(rows, columns):
        return pair
    product, one = b @ a, torch.eye(min(rows, columns), dtype=a.dtype).expand(*a.shape[:-2], -1, -1)
    a, b = (one, product) if columns <= rows else (product, one)
    return {**pair, "lora_A": a.contiguous(), "lora_B": b.contiguous()}
