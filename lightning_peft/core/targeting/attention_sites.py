"""Find attention modules, and determine the widths of their keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part, why_frozen
from lightning_peft.core.targeting.packed import is_packed, linear_sizes
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.core.targeting.selection import select

__all__ = ["EAGER", "AttentionSite", "attention_sites", "find_attention"]


@dataclass(frozen=True)
class AttentionSite:
    """An attention module.

    Attributes:
        name: its qualified name.
        module: the attention module.
        key_width: total width of its keys, key heads x head width.
        value_width: total width of its values.
        query_width: total width of its queries; larger than ``key_width`` if groups of query heads share keys.
    """

    name: str
    module: nn.Module = field(repr=False)
    key_width: int
    value_width: int
    query_width: int


_KEY = re.compile(r"(to_|w|linear_|fc_)?(k|key)(_proj|_lin|_linear|_layer|_attn|s)?")
_QKV = re.compile(r"(to_|w|linear_|attn_|c_)?(qkv|query_key_value|in_proj|attn)(_proj|_linear)?", re.IGNORECASE)


def attention_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """Return the attention modules of ``model`` by name: the modules with key and value projections.

    The widths are read from the projections, which covers grouped-query attention without special handling.
    """
    sites = {}
    for name, module in base_modules(model):
        widths = _widths(module)
        if widths is not None:
            sites[name] = AttentionSite(name, module, *widths)
    return sites


def _widths(module: nn.Module) -> tuple[int, int, int] | None:
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim, module.embed_dim
    projections = {n: w for n, c in module.named_children() if (w := _in_out(c)) is not None}
    for name, (_, key_width) in projections.items():
        if _KEY.fullmatch(name):
            value, query = (
                projections.get(name.replace("key", to) if "key" in name else name.replace("k", to[0], 1))
                for to in ("value", "query")
            )
            if value is not None:
                return key_width, value[1], query[1] if query is not None else key_width
    for name, (_, width) in projections.items():
        others = {n: pair for n, pair in projections.items() if n != name}
        if _QKV.fullmatch(name) and others:
            # The output projection reads the outputs of all query heads, so its input is as wide as the queries.
            queries = 0 if any(n.startswith("q") for n in others) else list(others.values())[-1][0]
            if width > queries and (width - queries) % 2 == 0:
                return (width - queries) // 2, (width - queries) // 2, queries or width // 2
    return None


def _in_out(module: nn.Module) -> tuple[int, int] | None:
    if is_packed(module):
        rows, columns = linear_sizes(module) or (0, 0)
        return columns, rows
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    return (weight.shape[0], weight.shape[1]) if hasattr(module, "nf") else None  # Hugging Face's Conv1D


def find_attention(
    model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] = (), kv_dim: int | None = None
) -> dict[str, AttentionSite]:
    """Return the attention modules that ``targets`` selects.

    Args:
        model: any module.
        targets: ``"all-attention"`` or patterns.
        exclude: patterns for modules to leave out.
        kv_dim: the width of keys and values, for modules whose projections are not recognised by their names.

    Raises:
        TargetError: if the model has no attention, if a pattern matches none, or if a module uses an attention
            implementation that cannot take a prefix.
    """
    sites = attention_sites(model)
    modules = {name: module for name, module in base_modules(model) if name}

    def all_attention() -> list[str]:
        left_alone = in_frozen_part(model)
        free = [name for name in sites if not left_alone(name)]
        if not free:
            kinds = sorted({original_class(m).__name__ for m in modules.values()})
            raise TargetError(
                "targets='all-attention' finds no attention: no module here has key and value projections. The "
                f"model has {kinds[:12]}; name the attention modules in targets and pass kv_dim=" + why_frozen(model)
            )
        return free

    chosen = select(
        modules,
        targets,
        exclude,
        {"all-attention": all_attention},
        candidates=lambda pattern: [
            n for n, m in modules.items() if (n in sites or kv_dim is not None) and match(pattern, n, m)
        ],
        missing=lambda pattern: _no_attention(pattern, sites, modules),
    )
    if kv_dim is not None:
        sites |= {n: AttentionSite(n, modules[n], kv_dim, kv_dim, kv_dim) for n in chosen if n not in sites}
    for site in map(sites.__getitem__, chosen):
        kind = getattr(getattr(site.module, "config", None), "_attn_implementation", None)
        if kind not in (None, "sdpa", "eager", EAGER):
            raise TargetError(
                f"{site.name!r} runs {kind!r} attention, which does not accept a prefix; load the model with "
                "attn_implementation='sdpa' (or call model.set_attn_implementation('sdpa'))"
            )
    order = {name: i for i, name in enumerate(modules)}
    return {n: sites[n] for n in sorted(chosen, key=lambda n: order.get(n, -1))}


def _no_attention(pattern: str, sites: Mapping[str, AttentionSite], modules: Mapping[str, nn.Module]) -> str:
    hits = {n: m for n, m in modules.items() if match(pattern, n, m)}
    if not hits:
        return no_match(pattern, {n: modules[n] for n in sites if n} or modules)
    name, module = next(iter(hits.items()))
    inside = [n for n in sites if is_within(n, name)]
    if inside:
        return f"{pattern!r} matches {name!r}, which contains attention but is not one itself; nearest: {inside[0]!r}"
    return (
        f"{pattern!r} matches {name!r} ({original_class(module).__name__}), which has no key and value projections; "
        f"if it is attention, pass kv_dim= (key heads x head width)"
        + (f"; attention is {list(sites)[:4]}" if sites else "")
    )


EAGER = "lightning_peft_eager"
