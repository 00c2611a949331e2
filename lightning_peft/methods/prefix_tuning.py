"""Prefix tuning: every attention layer gets trained keys and values that all queries attend to.

    Attn(Q, [P_K; K], [P_V; V]),    P_K in R^{T x keys}, P_V in R^{T x values}

T (keys + values) parameters train per attention layer, where keys and values are their widths. With
``bottleneck_size``, a small network computes the prefixes of all layers from one embedding E (T x e, where e is the key
width of the first layer): [P_K, P_V]_l = U_l act(D E) + c_l. The network stabilises training and is removed afterwards.
With
``gate``, attention to the prefix is computed separately and added: Attn(Q, K, V) + g Attn(Q, P_K, P_V), with g = 0 at
the start.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190.
Without the network, for tasks of every kind: Liu et al. 2021, "P-Tuning v2", arXiv:2110.07602.
The gate: Zhang et al. 2023, "LLaMA-Adapter", arXiv:2303.16199.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.attention_prefix import AttentionError, call_with_prefix, mask_columns
from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.batching.batched import BatchedAdapters
from lightning_peft.core.batching.layout import BatchLayout
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.kv_cache import cache_length, find_cache
from lightning_peft.core.module_io import by_name, parameters_of
from lightning_peft.core.names import is_within
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.attention_sites import AttentionSite, find_attention
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.blocks import find_blocks
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.arguments import Check, as_list, is_int, optional, positive, positive_int
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.methods.shared.cached_step import check_cached_step
from lightning_peft.methods.shared.prefix_batching import BatchedPrefixes
from lightning_peft.methods.shared.prefix_window import prefix_in_window, sliding_window

__all__ = ["PrefixTuning"]

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


_block_indices = Check(
    "a list of block indices such as [0, 1, -1]", lambda layers: bool(layers) and all(map(is_int, layers))
)


class PrefixTuning(PEFTMethod):
    """Adds trained keys and values to every attention layer (Li and Liang 2021, arXiv:2101.00190).

    The prefix is added at the attention call itself. This works for every module that calls
    ``scaled_dot_product_attention``, for ``nn.MultiheadAttention``, and for Hugging Face models with "sdpa" or "eager"
    attention. The prefix is not stored in the KV cache, and the length of your sequence does not change. If a model
    returns attention weights, they cover your tokens only, so they sum to less than 1: the rest went to the prefix.

    Choose it when the base must stay unchanged and many tasks share one served model, since a prefix does not change
    weights. It costs T extra keys in each attention call and an explicit mask in causal layers (no ``is_causal``
    kernel), and cannot be merged. It learns slowly: use a learning rate of 1e-3 to 1e-2.

    Args:
        num_virtual_tokens: length T of the prefix.
        targets: ``"all-attention"``, or patterns of attention modules (for T5, for example,
            ``["SelfAttention", "EncDecAttention"]``).
        layers: indices of the blocks whose attention gets a prefix; negative indices count from the end. None means
            all.
        bottleneck_size: width of the network that computes the prefixes during training; None trains them directly.
            :func:`lightning_peft.fold` replaces the network by its output.
        activation: activation of that network: ``"tanh"``, ``"relu"``, ``"gelu"`` or ``"silu"``.
        gate: compute attention to the prefix separately, and add it multiplied by a learned number per layer, which is
            initially 0.
        init: ``"normal"`` or ``"zero"``: initial values of the prefixes, or ``"zero"`` for the network's last layer.
        init_std: standard deviation for ``init="normal"``.
        kv_dim: width of keys and of values (key heads x head width), for modules whose projections have unusual names;
            None reads it from the modules.
        shift_positions: start the positions of your tokens at T, and let the prefix fall out of sliding windows
            (Mistral, Gemma) like any other token. Hugging Face PEFT does so; set it to reproduce adapters trained
            there. If False, every token sees the whole prefix.

    Raises:
        ValueError: if an argument is out of range.
        TargetError: if no attention is found, or its attention function does not support a prefix (flash and flex
            attention).
        AttentionError: at the first forward pass, if an adapted module makes no attention call.

    Example::

        trainer = L.Trainer(callbacks=[lp.PrefixTuning(num_virtual_tokens=20, bottleneck_size=512)])
    """

    parameter_count = "T keys and values in each layer"
    resume_may_differ = PEFTMethod.resume_may_differ | {"init", "init_std"}

    num_virtual_tokens: int = field(default=20, validator=positive_int, kw_only=False)
    targets: str | Sequence[str] = "all-attention"
    layers: Sequence[int] | None = field(default=None, converter=as_list, validator=optional(_block_indices))
    bottleneck_size: int | None = field(default=None, validator=optional(positive_int))
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    gate: bool = False
    init: Literal["normal", "zero"] = "normal"
    init_std: float = field(default=0.02, validator=positive)
    kv_dim: int | None = field(default=None, validator=optional(positive_int))
    shift_positions: bool = False

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        sites = find_attention(model, self.targets, self.exclude, self.kv_dim)
        if self.layers is not None:
            sites = _in_layers(model, sites, self.layers)
        source = None
        if self.bottleneck_size is not None:
            with self.seeded_init("encoder"):
                width = next(iter(sites.values())).key_width
                source = PrefixSource(self.num_virtual_tokens, width, self.bottleneck_size, self.activation)
        for i, site in enumerate(sites.values()):
            with self.seeded_init(site.name):
                std = self.init_std if self.init == "normal" else 0.0
                adapter = PrefixAdapter(site, self.num_virtual_tokens, std, self.gate, source, owns_source=i == 0)
            adapter.window = sliding_window(site.module) if self.shift_positions else None
            kind = original_class(site.module).__name__
            made = f" through {self.bottleneck_size}" if source is not None else ""
            widths = f"{site.key_width}+{site.value_width}"
            what = f"prefix of {self.num_virtual_tokens} x {widths}{made} on {kind}"
            plan.attach.append(Attachment(site.name, site.name, adapter, what))
        if self.shift_positions:
            where = _owner_of_positions(model, list(sites))
            shift, what = PositionShift(self.num_virtual_tokens), f"positions from {self.num_virtual_tokens}"
            plan.attach.append(Attachment(where, where, shift, what))
        return plan

    def without_reparameterization(self) -> PrefixTuning:
        """A copy of this method with directly trained prefixes, as after :func:`lightning_peft.fold`."""
        method = copy.copy(self)
        method.bottleneck_size = None
        return method


class PrefixSource(nn.Module):
    """The part of the network that all layers share; it computes act(D E) (T, bottleneck)."""

    def __init__(self, tokens: int, width: int, bottleneck: int, activation: str) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.Linear(width, bottleneck)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self) -> Tensor:
        return self.activation(self.down(self.embedding))


class PrefixAdapter(Adapter):
    """The prefix of one attention module: ``prefix_keys`` (T, keys) and ``prefix_values`` (T, values).

    With a source, ``up`` computes them instead. The source is stored once, with the first layer.
    """

    misfit_errors = (AttentionError,)
    unscalable = (
        "a prefix takes part in the softmax of an attention, where a fraction of it is not defined. Train it with "
        "gate=True, which learns its share"
    )

    def __init__(
        self,
        site: AttentionSite,
        tokens: int,
        std: float,
        gate: bool = False,
        source: PrefixSource | None = None,
        owns_source: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.widths = (site.key_width, site.value_width)
        self.groups = max(1, site.query_width // site.key_width)  # number of query heads per key head
        # a tuple, so that the shared source is registered only once
        self._source: tuple[PrefixSource, ...] = () if source is None else (source,)
        if source is None:
            self.prefix_keys = nn.Parameter(torch.randn(tokens, site.key_width) * std)
            self.prefix_values = nn.Parameter(torch.randn(tokens, site.value_width) * std)
        else:
            self.up = nn.Linear(source.down.out_features, sum(self.widths))
            if std == 0:
                nn.init.zeros_(self.up.weight)
                nn.init.zeros_(self.up.bias)
            if owns_source:
                self.source = source
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None
        self.window: int | None = None

    def key_values(self) -> tuple[Tensor, Tensor]:
        """The prefix itself: keys (T, keys) and values (T, values)."""
        if not self._source:
            return self.prefix_keys, self.prefix_values
        keys, values = self.up(self._source[0]()).split(self.widths, -1)
        return keys, values

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prefix = prefix_in_window(self, [self.window], self.tokens, host, (*args, *kwargs.values()))
        return call_with_prefix(host, prefix, call, *args, **kwargs)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters]:
        return BatchedPrefixes

    @property
    def extends(self) -> bool:
        return self.gate is None

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.extends:
            return key, value, mask
        keys, values = self.key_values()
        if mask is not None:
            mask = F.pad(mask_columns(mask, key), (self.tokens, 0), value=True if mask.dtype == torch.bool else 0.0)
        return (
            torch.cat([self.by_head(keys, key), key], -2),
            torch.cat([self.by_head(values, value), value], -2),
            mask,
        )

    def add(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.gate is None:
            return out
        keys, values = self.key_values()
        k, v = self.by_head(keys, key), self.by_head(values, value)
        if k.ndim > 3 and query.shape[-3] != k.shape[-3]:
            k, v = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (k, v))
        attended = ((query * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return out + self.gate.to(out.dtype) * attended.to(out.dtype)

    def by_head(self, prefix: Tensor, like: Tensor) -> Tensor:
        """Reshape ``prefix`` (T, heads x width) to the layout of ``like`` (..., heads, length, width)."""
        tokens, total = prefix.shape
        width = like.shape[-1]
        heads = total // width
        # Some modules put batch and heads into one dimension, after repeating the keys for each query head.
        folded = like.ndim == 3 and heads > 1
        have = like.shape[-3] if like.ndim > 3 or folded else 1
        groups = self.groups if folded else have // max(heads, 1)
        if total % width or have % (heads * groups):
            raise AttentionError(
                f"a prefix of width {total} does not fit {have} heads of width {width} at the attention call: set "
                "kv_dim to (key heads x head width)"
            )
        out = prefix.to(like.dtype).view(tokens, heads, width).transpose(0, 1)
        out = out.repeat_interleave(groups, 0) if groups != 1 else out
        if folded:
            return out.repeat(have // (heads * groups), 1, 1)
        return (
            out.expand(*like.shape[:-3], have, tokens, width)
            if like.ndim > 3
            else out.expand(*like.shape[:-2], tokens, width)
        )

    @property
    def has_reparameterization(self) -> bool:
        return bool(self._source)

    def remove_reparameterization(self) -> None:
        keys, values = self.key_values()
        self.prefix_keys, self.prefix_values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())
        self._source = ()
        del self.up
        if hasattr(self, "source"):
            del self.source

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, widths={self.widths}, gated={self.gate is not None}"


def batched_shift(batch_layout: BatchLayout, adapters: Sequence[PositionShift | None]) -> PositionShift:
    """A :class:`PositionShift` for a batch whose rows use different prefixes."""
    return PositionShift(*(0 if a is None else a.tokens[0] for a in adapters))


class PositionShift(Adapter):
    """Adds the prefix's length to the position ids; has no parameters.

    Args:
        tokens: length of the prefix, or one length for each row of a batch.
    """

    unscalable = PrefixAdapter.unscalable

    def __init__(self, *tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.cache_checked = False

    def batched_class(self, host: nn.Module) -> Any:
        return batched_shift

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(host, args, kwargs)
        positions, ids = given.get("position_ids"), given.get("input_ids")
        like = given["inputs_embeds"][..., 0] if ids is None else ids
        if positions is None:
            cache = find_cache(given.values())
            past = 0 if cache is None else cache_length(cache)
            positions = torch.arange(like.shape[1], device=like.device).unsqueeze(0) + past
        shift: int | Tensor = self.tokens[0]
        if len(self.tokens) > 1:
            by_row = torch.tensor(self.tokens, device=like.device)
            shift = by_row.repeat_interleave(len(like) // len(self.tokens))[:, None]
        given["position_ids"] = positions + shift
        out = call(**given)
        self._check_cache(host, call, given, out)
        return out

    def _check_cache(self, host: Any, call: Callable[..., Any], given: dict[str, Any], out: Any) -> None:
        """Check once that a step with the cache in ``out`` is correct; raises :class:`CacheError` if not."""

        def embeds() -> Tensor:
            ids = given.get("input_ids")
            return cast(Tensor, given["inputs_embeds"] if ids is None else host.get_input_embeddings()(ids))

        def run(**given: Any) -> Any:
            return self.run(host, call, **given)

        def whole(start: Tensor, step: Tensor, **rest: Any) -> Any:
            return run(inputs_embeds=torch.cat([start, step], 1), **rest)

        check_cached_step(self, host, run, whole, out, given, embeds)


def _in_layers(model: nn.Module, sites: dict[str, AttentionSite], layers: Sequence[int]) -> dict[str, AttentionSite]:
    blocks = [name for name, _ in find_blocks(model)]
    for i in layers:
        if not -len(blocks) <= i < len(blocks):
            raise TargetError(
                f"layers={list(layers)!r} is out of range: the model has {len(blocks)} blocks, {blocks[:1]} to "
                f"{blocks[-1:]}. Use indices from {-len(blocks)} to {len(blocks) - 1}"
            )
    wanted = [blocks[i] for i in layers]
    inside = {n: s for n, s in sites.items() if is_within(n, *wanted)}
    if not inside:
        raise TargetError(
            f"layers={list(layers)!r} selects {wanted}, but none of the targeted attention is inside them"
        )
    return inside


def _owner_of_positions(model: nn.Module, sites: list[str]) -> str:
    """The innermost module around all ``sites`` whose forward takes ``position_ids``."""
    around = [
        name
        for name, module in base_modules(model)
        if all(is_within(s, name) and s != name for s in sites)
        and "position_ids" in parameters_of(module)
        and {"input_ids", "inputs_embeds"} & {*parameters_of(module)}  # inner layers get positions computed elsewhere
    ]
    if not around:
        raise TargetError(
            "shift_positions=True is not supported on this model: no module around the attention takes position_ids. "
            "Set shift_positions=False"
        )
    return around[-1]
