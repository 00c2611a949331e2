"""LoRA: low-rank adaptation.

    W' = W + s B A,    A in R^{r x in}, B in R^{out x r},    s = alpha / r

Only A and B train: r (in + out) parameters for an in x out matrix. B starts at zero (for an embedding, A does), so the
adapted model initially computes what the base computes. With ``use_rslora`` s = alpha / sqrt(r), which keeps the size
of the update independent of the rank. On activations the layer computes y + s B (A x): two thin matrix products in
addition to its own. ``lora_bias`` adds a bias to the second product: y + s (B (A x) + c).

PiSSA and OLoRA initialise A and B from W. The adapter then stores the initial values A0 and B0 and computes

    W' = W + s (B A - B0 A0) = W + s [B - B0, B0] [A; A - A0]

This trains like the paper's W - s B0 A0 + s B A, but equals W exactly at the start and leaves the base unchanged.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. LoRA+: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large
Models", arXiv:2402.12354. LoRA-FA: Zhang et al. 2023, arXiv:2308.03303. Initialisations: see
:mod:`lightning_peft.methods.shared.lora_init`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.adapters.low_rank import LowRankAdapter
from lightning_peft.core.batching.batched import BatchedAdapters
from lightning_peft.core.names import join, listed, owner_of
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.biases import bias_parameters, buffer_biases
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import optional, positive, probability
from lightning_peft.methods.families.ranked import RankedMethod
from lightning_peft.methods.families.weight import above_both_sides, check_bias, check_dropout
from lightning_peft.methods.shared.lora_init import check_init, initial_factors, reads_weight
from lightning_peft.methods.shared.trainable_tokens import as_tokens, plan_trainable_tokens
from lightning_peft.trainer.param_groups import split_groups

__all__ = ["LoRA", "LoRAAdapter", "plain_factors"]


class LoRAAdapter(LowRankAdapter):
    """The factors of one matrix: ``lora_A`` (..., r, in) and ``lora_B`` (..., out, r).

    ``lora_A0`` and ``lora_B0`` are their initial values if the initialisation is derived from the weight, else None.
    ``lora_bias`` (out) is the bias added after B, or None.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None
    lora_bias: Tensor | None
    neutral = {"lora_B": 0.0, "lora_B0": 0.0, "lora_bias": 0.0}
    output_is_product = True  # not with lora_bias; see batched_class

    def __init__(
        self,
        site: Site,
        r: int,
        scale: float,
        dropout: float = 0.0,
        init: str = "kaiming",
        freeze_A: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(site, dropout)
        self.r = r
        self.scale = scale
        self.looked_up = isinstance(site.layout, EmbeddingLayout)
        self.changes_bias = bias
        a, b = initial_factors(site, r, scale, init)
        kept = reads_weight(init)
        self.register_buffer("lora_A0", a.clone() if kept else None)
        self.register_buffer("lora_B0", b.clone() if kept else None)
        self.lora_A = nn.Parameter(a, requires_grad=self.looked_up or not freeze_A)
        self.lora_B = nn.Parameter(b, requires_grad=not (self.looked_up and freeze_A))
        self.register_parameter("lora_bias", nn.Parameter(torch.zeros(b.shape[-2])) if bias else None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (..., k, in) and B (..., out, k) such that the update is s B A.

        k is r, or 2 r if initial values are subtracted. The differences A - A0 and B - B0 are computed before the
        product, so that a small change of large values survives half precision.
        """
        return plain_factors(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = super().output(host, x, y)
        if self.lora_bias is None:
            return out
        return (out + self.scale * self.layout.features(host, self.lora_bias)).to(out.dtype)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        # The batched products compute B (A x) alone: they would skip the bias.
        return super().batched_class(host) if self.lora_bias is None else WeightAdapter.batched_class(self, host)

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.lora_bias is None:
            return bias
        own = self.scale * self.lora_bias
        return own if bias is None else bias + own

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}"


class LoRA(RankedMethod):
    """Low-rank adaptation: adds a trained low-rank product B A to each frozen weight (arXiv:2106.09685).

    Choose it when you have no reason to prefer another method: it matches full fine-tuning on most tasks with well
    under 1 % of the parameters. It costs two thin matrix products per adapted layer during training, and nothing once
    merged.

    Args:
        r: rank of the update; r (in + out) parameters train per matrix.
        alpha: the update is scaled by alpha / r.
        dropout: probability of zeroing an element of the adapter's input during training. It needs a layer that is
            called with activations (Linear, Conv1D, Conv1d/2d/3d); embeddings ignore it.
        use_rslora: scale the update by alpha / sqrt(r) instead (arXiv:2312.03732).
        bias: which base biases train: ``"none"``, ``"lora_only"`` (those of the adapted layers) or ``"all"``.
        lora_bias: add a trainable bias to the output of B. The layer must support a bias (Linear, Conv1D,
            Conv1d/2d/3d, the projections of ``nn.MultiheadAttention``).
        init: ``"kaiming"`` (A uniform as in ``nn.Linear``, B zero) or ``"gaussian"`` (A normal with standard deviation
            1/r, B zero); for embeddings, A is zero and B normal instead. ``"orthogonal"``: A and B are nonzero, but
            B A is zero; r must be even. ``"pissa"``: from the r largest singular values of the weight
            (arXiv:2404.02948); ``"pissa_niter_4"`` approximates them in 4 iterations. ``"olora"``: from the QR
            decomposition of the weight (arXiv:2406.01775). The last three learn faster, but decompose every weight at
            the start and store a second pair of factors. The base is never changed.
        trainable_tokens: ids of tokens (new or special ones) whose entries in the input embedding train in full, or
            lists of ids by pattern of the embedding: ``{"embed_tokens": [128255]}``. A tied output head uses the same
            trained entries.
        lora_plus_ratio: LoRA+ (arXiv:2402.12354): the learning rate of B is this many times the optimizer's rate; the
            paper recommends 16. None trains A and B at the same rate. Your optimizer's parameter groups are split and
            keep their options, and learning-rate schedulers apply to both. Embeddings keep one rate, since their A
            starts at zero.
        freeze_A: LoRA-FA (arXiv:2308.03303): train B only. This halves the trained parameters, and layer inputs need
            not be stored for A's gradient. For embeddings, A trains and B is frozen.

    Raises:
        ValueError: if r is below 1 or above both sides of a matrix; if dropout is outside [0, 1), or set for a weight
            that is not called with activations; if init is unknown or does not fit the weight; if lora_plus_ratio is
            not positive, or is combined with freeze_A.

    Example::

        trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    parameter_count = "r (in + out)"
    resume_may_differ = RankedMethod.resume_may_differ | {
        *("dropout", "bias", "init", "lora_plus_ratio", "freeze_A", "trainable_tokens")
    }
    adapter_class: ClassVar[type[LoRAAdapter]] = LoRAAdapter

    alpha: float = field(default=16, kw_only=False)
    dropout: float = field(default=0.0, validator=probability)
    use_rslora: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    init: str = field(default="kaiming", validator=lambda _, __, init: check_init(init))
    lora_plus_ratio: float | None = field(default=None, validator=optional(positive))
    freeze_A: bool = False
    lora_bias: bool = False
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] = field(default=(), converter=as_tokens)

    def check(self) -> None:
        if self.lora_plus_ratio is not None and self.freeze_A:
            raise ValueError(
                "lora_plus_ratio sets separate learning rates for A and B, but freeze_A=True does not train A: remove "
                "one of the two"
            )

    def scale_at(self, site: Site) -> float:
        scale = super().scale_at(site)
        return scale * math.sqrt(self.rank_at(site)) if self.use_rslora else scale

    def too_small(self, site: Site) -> str | None:
        return above_both_sides(self.rank_at(site), "r", site)

    def build(self, site: Site) -> LoRAAdapter:
        r = self.rank_at(site)
        if (problem := self.too_small(site)) is not None:
            own = {site.name: min(site.shape[-2:])}
            raise ValueError(f"{problem}. Lower r, exclude the layer, or set its own rank: rank_pattern={own}")
        check_dropout(type(self).__name__, self.dropout, site)
        if self.lora_bias:
            check_bias(site)
            if site.bias is None:
                raise ValueError(
                    f"lora_bias=True is not supported on {site.name!r}: this layer cannot have a bias. Exclude it, and "
                    "add a second LoRA with lora_bias=False for it"
                )
        return self.adapter_class(site, r, self.scale_at(site), self.dropout, self.init, self.freeze_A, self.lora_bias)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        parts = [(a.host, part) for a in plan.attach for part in lora_parts(a.adapter)]
        for _, part in parts:
            largest = min(part.lora_A.shape[-1], part.lora_B.shape[-2])
            if part.r > largest:
                plan.notes.append(f"{part.site_name}: r={part.r}, but the weight's rank is at most {largest}")
        # The modules that own the weights: out_proj of an nn.MultiheadAttention is a module with its own bias.
        adapted = {owner_of(join(host, part.parameter)) for host, part in parts}
        fixed = [] if self.bias == "none" else [n for n in buffer_biases(model) if self.bias == "all" or n in adapted]
        if fixed:
            raise TargetError(
                f"bias={self.bias!r} would train the biases of {listed(fixed)}, but these quantised layers store them "
                "as buffers, which cannot train: set bias='none', or lora_bias=True to add trainable ones"
            )
        for owner, key, _ in bias_parameters(model) if self.bias != "none" else ():
            if self.bias == "all" or owner in adapted:
                plan.train[join(owner, key)] = "bias trains"
        plan_trainable_tokens(plan, model, self.trainable_tokens, self.seeded_init)
        return plan

    def configure_param_groups(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if self.lora_plus_ratio is None:
            return
        found = [stack[self.name] for stack in stacks(model).values() if self.name in stack]
        parts = [part for adapter in found for part in lora_parts(adapter)]
        faster = {id(part.lora_B) for part in parts if not part.looked_up}
        scaled = {"lr_scale": self.lora_plus_ratio}
        split_groups(optimizer, lambda p: scaled if id(p) in faster else {})


def plain_factors(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors whose product is B A - B0 A0; A and B themselves if there are no initial values to subtract."""
    if a0 is None or b0 is None:
        return a, b
    return torch.cat([a, a - a0], dim=-2), torch.cat([b - b0, b0], dim=-1)


def lora_parts(adapter: nn.Module) -> Iterator[LoRAAdapter]:
    """All LoRA adapters inside the adapter of one host module."""
    return (part for part in adapter.modules() if isinstance(part, LoRAAdapter))
