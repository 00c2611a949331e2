"""Find the blocks of a model in order of depth, and the attention and feed-forward sub-layers inside them.

Layers are selected, frozen and unfrozen by block. Sub-layers are found by structure and by common names. Two modules
mark a sub-layer: ``start``, whose input is the sub-layer's input, and ``end``, whose output the block adds to its
residual stream. They are often the same module. They differ if the block runs the feed-forward itself: ``linear1`` and
``linear2`` of ``nn.TransformerEncoderLayer``, or BERT's ``intermediate`` and ``output``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, join, leaf, owner_of
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part
from lightning_peft.core.targeting.linear_like import output_features
from lightning_peft.core.targeting.packed import is_packed, linear_sizes
from lightning_peft.core.targeting.sites import Site, output_head, weight_sites

__all__ = ["Sublayer", "channels_first", "find_blocks", "find_sublayers", "input_width", "label", "output_width"]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks of ``model`` with their qualified names, in definition order.

    A block is a composite module inside a ``ModuleList``, ``Sequential`` or ``ModuleDict``. Its class must occur in
    such containers at least twice, or it must be the only module in its container. If blocks are nested, only the
    outermost count: a transformer's layers, not their heads. In a model without blocks (a plain ``Sequential``), every
    layer with parameters is a block. Parts that the user froze as a whole are skipped.
    """
    left_alone = in_frozen_part(model)
    inside = [
        (join(name, child), module, len(container))
        for name, container in base_modules(model)
        if isinstance(container, _CONTAINERS)
        for child, module in container.named_children()
    ]
    composite = [
        (n, m, size)
        for n, m, size in inside
        if not isinstance(m, _CONTAINERS) and any(True for _ in m.children()) and not left_alone(n)
    ]
    kinds = [original_class(m) for _, m, _ in composite]
    repeated = [(n, m) for n, m, _ in composite if kinds.count(original_class(m)) > 1]
    every = sum(1 for _ in model.parameters())
    alone = [(n, m) for n, m, size in composite if size == 1 and sum(1 for _ in m.parameters()) < every]
    if blocks := _outermost(repeated) or _outermost(alone):
        return blocks
    owners = [(n, m) for n, m in base_modules(model) if n and any(True for _ in m.parameters(recurse=False))]
    return [(n, m) for n, m in owners if not left_alone(n)]


def _outermost(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in blocks if not is_within(owner_of(n), *(other for other, _ in blocks))]


@dataclass(frozen=True)
class Sublayer:
    """An attention or feed-forward sub-layer of a block.

    Attributes:
        kind: which of the two it is.
        start: the name of the module whose input is the sub-layer's input.
        end: the name of the module whose output is the sub-layer's output, before residual sum and norm.
        sites: the names of the linear layers and projections inside, in order.
        outputs: the sites that project back to the width of the sub-layer's input; several for experts.
        width: number of output features, or None if it is unknown.
    """

    kind: Literal["attention", "feedforward"]
    start: str
    end: str
    sites: tuple[str, ...]
    outputs: tuple[str, ...]
    width: int | None


_ATTENTION_CLASS = re.compile(r".*(Attention|Attn)\d*(D|d)?")
_ATTENTION_NAME = re.compile(r"(self_?|cross_?|encoder_|multihead_)?(attn|attention)\d*|mha")
_FEEDFORWARD_CLASS = re.compile(
    r".*(MLP|Mlp|MLPBlock|FeedForward|FeedForwardNetwork|FFN|FF|DenseActDense|DenseGatedActDense|SwiGLU|MoeBlock|MoE)\d*"
)
_FEEDFORWARD_NAME = re.compile(r"mlp|ffn?|feed_?forward|(block_sparse_)?moe")
#: pairs of child modules that together form a feed-forward
_PAIRS = [("linear1", "linear2"), ("fc1", "fc2"), ("ffn", "ffn_output"), ("lin1", "lin2"), ("intermediate", "output")]
_LAST = {
    "attention": {"o_proj", "out_proj", "out_lin", "c_proj", "proj", "wo", "o", "dense", "output", "out", "to_out"},
    "feedforward": {"down_proj", "fc2", "c_proj", "wo", "w2", "lin2", "linear2", "linear_2", "dense_4h_to_h"}
    | {"output_dense", "fc_out", "proj", "dense", "ffn_output"},
}


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Return the sub-layers in all blocks of ``model``, in order; empty if nothing is recognised as one."""
    sites = weight_sites(model)
    head = output_head(model, sites)
    modules = dict(base_modules(model))
    blocks = find_blocks(model)
    repeated = [name for name, module in blocks if any(True for _ in module.children())]
    found = list(_search(modules, repeated, sites, head)) if len(repeated) == len(blocks) else []
    found = found or list(_search(modules, [""], sites, head))
    order, left_alone = list(modules), in_frozen_part(model)
    found = [sublayer for sublayer in found if not left_alone(sublayer.start)]
    return sorted(found, key=lambda sublayer: order.index(sublayer.start))


def label(site: str) -> str:
    """Return the last part of a name that is not a number, in lower case: ``to_out`` for ``attn.to_out.0``."""
    parts = [part for part in site.lower().split(".") if not part.isdigit()]
    return parts[-1] if parts else site


def output_width(module: nn.Module) -> int | None:
    """Return the number of output features, read from the module's attributes or those of its last layer."""
    own = _own_width(module)
    if own is not None:
        return own
    inside = [_own_width(m) for name, m in base_modules(module) if name]
    return next((width for width in reversed(inside) if width is not None), None)


def input_width(module: nn.Module) -> int | None:
    """Return the number of input features of a layer; None for a composite module, whose first layer is unknown."""
    widths = (module.__dict__.get(attribute) for attribute in ("in_features", "in_channels", "nx"))
    return next((width for width in widths if isinstance(width, int)), None)


def channels_first(module: nn.Module) -> bool:
    """Whether the second dimension of the module's output holds the features, as for a convolution."""
    layers = [m for name, m in base_modules(module) if _own_width(m) is not None]
    last = module if _own_width(module) is not None else (layers or [module])[-1]
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return isinstance(last, kinds)


def _own_width(module: nn.Module) -> int | None:
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    if isinstance(module, nn.RNNCellBase):
        return module.hidden_size
    for attribute in (
        "out_features",
        "out_channels",
        "num_features",
        "num_channels",
        "embed_dim",
        "embedding_dim",
        "nf",
    ):
        value = module.__dict__.get(attribute)
        if isinstance(value, int) and any(True for _ in module.parameters(recurse=False)):
            return value
    shape = module.__dict__.get("normalized_shape")
    if isinstance(shape, tuple):
        return shape[-1]
    if is_packed(module):
        return (linear_sizes(module) or (None,))[0]
    if (width := output_features(module)) is not None:
        return width
    weight = module._parameters.get("weight")
    is_norm = "Norm" in original_class(module).__name__ and weight is not None and weight.ndim == 1
    return weight.numel() if is_norm and weight is not None else None


def _search(
    modules: dict[str, nn.Module], roots: Iterable[str], sites: dict[str, Site], head: str | None
) -> Iterator[Sublayer]:
    for root in roots:
        done: list[str] = []
        found: list[Sublayer] = []
        for name, module in modules.items():
            if not name or not is_within(name, root) or is_within(name, *done):
                continue
            last = leaf(name)
            kind = original_class(module).__name__
            is_attention = isinstance(module, nn.MultiheadAttention) or (
                _ATTENTION_CLASS.fullmatch(kind) or (name != root and _ATTENTION_NAME.fullmatch(last))
            )
            is_feedforward = _FEEDFORWARD_CLASS.fullmatch(kind) or (name != root and _FEEDFORWARD_NAME.fullmatch(last))
            for what, hit in (("attention", is_attention), ("feedforward", is_feedforward)):
                sublayer = _sublayer(what, name, name, modules, sites) if hit and name not in sites else None
                if sublayer is not None and head not in sublayer.sites:
                    found.append(sublayer)
                    done.append(name)
                    break
            else:
                for first, second in _PAIRS:
                    start, end = f"{name}.{first}", f"{name}.{second}"
                    pair = start in modules and end in modules and _sublayer("feedforward", start, end, modules, sites)
                    if pair and head not in pair.sites:
                        found.append(pair)
                        done += [start, end]
                        break
        width = next((s.width for s in found if s.width is not None), None)
        for s in found:  # bare expert parameters do not show their width, but it equals the width of the block
            yield s if s.width is not None or not root else replace(s, width=width)


def _sublayer(
    kind: str, start: str, end: str, modules: dict[str, nn.Module], sites: dict[str, Site]
) -> Sublayer | None:
    names = list(dict.fromkeys(n for part in (start, end) for n in sites if is_within(n, part)))
    linear = [n for n in names if sites[n].linear_like]
    others = [n for n in names if not sites[n].is_computed and not sites[n].layout.has_activation]
    bare = [n for n in others if sites[n].weight.ndim == 3]
    if not linear and not bare:
        return None
    literal: Literal["attention", "feedforward"] = "attention" if kind == "attention" else "feedforward"
    last = [n for n in linear if label(n) in _LAST[kind] and is_within(n, end)]
    pair = start != end
    if not pair:
        start = _narrowed(start, names, modules, sites)
    outputs = tuple(n for n in names if label(n) in _LAST[kind])
    if (kind == "feedforward" and (bare or len(last) > 1)) or not linear:  # experts
        return Sublayer(literal, start, start, tuple(names), outputs, None)
    final = (last or linear)[-1]
    host = sites[final].host
    width = output_width(modules[host])
    enters = getattr(sites[linear[0]].module, "in_features", width)
    # A feed-forward returns to its input width. If this one does not, the last layer found is not its output layer.
    if kind == "feedforward" and enters != width:
        return Sublayer(literal, start, end if pair else start, tuple(names), outputs, enters)
    return Sublayer(literal, start, host, tuple(names), (final,), width)


def _narrowed(name: str, inside: list[str], modules: dict[str, nn.Module], sites: dict[str, Site]) -> str:
    """Return the smallest module inside ``name`` that contains all of ``inside``."""
    hosts = {sites[n].host for n in inside}
    while name not in hosts:
        deeper = [c for c in modules if c and owner_of(c) == name]
        around = [c for c in deeper if any(is_within(h, c) for h in hosts)]
        if len(around) != 1 or not all(is_within(h, around[0]) for h in hosts):
            break
        if isinstance(modules[around[0]], nn.ModuleList | nn.ModuleDict):
            break
        name = around[0]
    return name
