"""LoRA: low-rank adaptation.

    W' = W + s B A,    A in R^{r x in}, B in R^{out x r},    s = alpha / r

Only A and B train: r (in + out) parameters for a matrix of in x out. B (for an embedding: A) starts at zero, so
the adapted model starts as its base. With ``use_rslora`` s = alpha / sqrt(r), which keeps the size of the update
independent of the rank. On activations it is y + s B (A x): two thin products beside the layer's own. With
``lora_bias`` there is a bias in the second: y + s (B (A x) + c).

Where A and B start as a part of W (PiSSA, OLoRA), their first values A0 and B0 are kept, and

    W' = W + s (B A - B0 A0) = W + s [B - B0, B0] [A; A - A0]

which is the same function of A and B, exactly W at the start, and leaves the base as it is.

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
from lightning_peft.core.names import join, owner_of
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import optional, positive, probability
from lightning_peft.methods.families.ranked import RankedMethod
from lightning_peft.methods.families.weight import above_both_sides, check_bias, check_dropout
from lightning_peft.methods.shared.lora_init import check_init, initial_factors, reads_weight
from lightning_peft.methods.shared.trainable_tokens import as_tokens, plan_trainable_tokens
from lightning_peft.trainer.param_groups import split_groups

__all__ = ["LoRA", "LoRAAdapter", "plain_factors"]


class LoRAAdapter(LowRankAdapter):
    """A and B of one matrix: ``lora_A`` (..., r, in) and ``lora_B`` (..., out, r).

    ``lora_A0`` and ``lora_B0`` are their first values where those are a part of the weight; None otherwise.
    ``lora_bias`` (out) is B's bias, or None.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None
    lora_bias: Tensor | None

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
        super().__init__(site)
        self.r = r
        self.scale = scale
        self.looked_up = isinstance(site.layout, EmbeddingLayout)
        self.dropout = 0.0 if self.looked_up else dropout
        a, b = initial_factors(site, r, scale, init)
        kept = reads_weight(init)
        self.register_buffer("lora_A0", a.clone() if kept else None)
        self.register_buffer("lora_B0", b.clone() if kept else None)
        self.lora_A = nn.Parameter(a, requires_grad=self.looked_up or not freeze_A)
        self.lora_B = nn.Parameter(b, requires_grad=not (self.looked_up and freeze_A))
        self.register_parameter("lora_bias", nn.Parameter(torch.zeros(b.shape[-2])) if bias else None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (..., k, in) and B (..., out, k) of the plain low-rank update s B A that this adapter makes.

        k is r, or 2 r where the first values are taken off; differences are formed first, so that a small change of
        large values survives half precision.
        """
        return plain_factors(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = super().output(host, x, y)
        if self.lora_bias is None:
            return out
        return (out + self.scale * self.layout.features(host, self.lora_bias)).to(out.dtype)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        # The products of all rows together have no place for a bias, or for what a subclass makes of its output.
        plain = self.lora_bias is None and type(self).output is LoRAAdapter.output
        return super().batched_class(host) if plain else WeightAdapter.batched_class(self, host)

    @property
    def changes_bias(self) -> bool:
        return self.lora_bias is not None

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.lora_bias is None:
            return bias
        own = self.scale * self.lora_bias
        return own if bias is None else bias + own

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}"


class LoRA(RankedMethod):
    """Low-rank adaptation: a trained product B A beside each frozen weight (arXiv:2106.09685).

    Choose it first: it reaches full fine-tuning on most tasks with well under one percent of the parameters, adds two
    thin products to each adapted layer while training, and costs nothing once merged.

    Args:
        r: the rank; r (in + out) parameters train for each matrix.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an element of the adapter's input while training. It needs a layer that is
            called with activations (Linear, Conv1D, Conv1d/2d/3d); an embedding has no such input and takes none.
        use_rslora: scale by alpha / sqrt(r) instead (arXiv:2312.03732).
        bias: base biases to train: ``"none"``, ``"lora_only"`` (of the adapted layers) or ``"all"``.
        lora_bias: give B a bias of its own, for layers that have one or could (Linear, Conv1D, Conv1d/2d/3d, the
            projections of ``nn.MultiheadAttention``).
        init: ``"kaiming"`` (A uniform as in ``nn.Linear``, B zero), ``"gaussian"`` (A normal with standard deviation
            1/r, B zero); an embedding has A zero and B normal instead. ``"orthogonal"`` (both not zero, their product
            is; r must be even). ``"pissa"`` starts from the r largest singular values of the weight
            (arXiv:2404.02948), ``"pissa_niter_4"`` from their fast approximation by 4 iterations, ``"olora"`` from
            its QR decomposition (arXiv:2406.01775); these learn faster, keep a second pair of factors, and cost a
            decomposition of every weight at the start. The base is never changed.
        trainable_tokens: ids of tokens whose rows of the input embedding train in full (new or special ones), or
            lists of ids by pattern of the embedding: ``{"embed_tokens": [128255]}``. A tied output head follows.
        lora_plus_ratio: train B at so many times the optimizer's learning rate (LoRA+, arXiv:2402.12354, which found
            16 good); None trains both alike. The groups of your optimizer are split and keep their options, and its
            schedulers follow. Embeddings, whose A starts at zero, keep one rate.
        freeze_A: train B alone (LoRA-FA, arXiv:2308.03303): half the parameters, and no layer input is stored for
            A's gradient. For an embedding the factor that stays is B.

    Raises:
        ValueError: a rank below 1 or above both sides of the matrix, a dropout outside [0, 1), a dropout on a weight
            that is not called with activations, an unknown init or one that does not fit the weight, a ratio that is
            not positive, or a ratio with a frozen A, which leaves one rate only.

    Example::

        trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

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
            raise ValueError(f"{problem}: lower r, exclude the layer, or give it its own: rank_pattern={own}")
        check_dropout(type(self).__name__, self.dropout, site)
        if self.lora_bias:
            check_bias(site)
            if site.bias is None:
                raise ValueError(
                    f"lora_bias=True cannot be had on {site.name!r}, which adds no bias: exclude it, and add a second "
                    "LoRA without for it"
                )
        return self.adapter_class(site, r, self.scale_at(site), self.dropout, self.init, self.freeze_A, self.lora_bias)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        parts = [(a.host, part) for a in plan.attach for part in lora_parts(a.adapter)]
        for _, part in parts:
            largest = min(part.lora_A.shape[-1], part.lora_B.shape[-2])
            if part.r > largest:
                plan.notes.append(f"{part.site_name}: r={part.r} where the weight's rank is at most {largest}")
        # The modules that hold the weights: an attention's out_proj is one of its own.
        adapted = {owner_of(join(host, part.parameter)) for host, part in parts}
        for name, module in base_modules(model):
            wanted = self.bias == "all" or (self.bias == "lora_only" and name in adapted)
            for parameter, value in module._parameters.items() if wanted else ():
                if value is not None and parameter.endswith("bias"):
                    plan.train[join(name, parameter)] = "bias trains"
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

    def describe(self, adapter: WeightAdapter) -> str:
        assert isinstance(adapter, LoRAAdapter)
        return f"{type(self).__name__} r={adapter.r} scale={adapter.scale:g}"


def plain_factors(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pair whose product is B A - B0 A0; the pair (A, B) itself where nothing is taken off."""
    if a0 is None or b0 is None:
        return a, b
    return torch.cat([a, a - a0], dim=-2), torch.cat([b - b0, b0], dim=-1)


def lora_parts(adapter: nn.Module) -> Iterator[LoRAAdapter]:
    """The pairs (A, B) in what one host carries."""
    return (part for part in adapter.modules() if isinstance(part, LoRAAdapter))
