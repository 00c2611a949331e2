"""LoRA: low-rank adaptation.

    W' = W + s B A,    A in R^{r x in}, B in R^{out x r},    s = alpha / r

Only A and B train: r (in + out) parameters for a matrix of in x out. B (for an embedding: A) starts at zero, so
the adapted model starts as its base. With ``use_rslora`` s = alpha / sqrt(r), which keeps the size of the update
independent of the rank. On activations it is y + s B (A x): two thin products beside the layer's own.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, WeightAdapter
from lightning_peft.core.inject import Plan
from lightning_peft.core.sites import EmbeddingLayout, Site
from lightning_peft.core.targets import TargetError, base_modules, match, no_match
from lightning_peft.methods.callback import one_of, positive_int, probability
from lightning_peft.methods.weight import WeightMethod
from lightning_peft.ops.dropout import dropped

__all__ = ["LoRA"]


class LoRA(WeightMethod):
    """Low-rank adaptation: a trained product B A beside each frozen weight (arXiv:2106.09685).

    Choose it first: it reaches full fine-tuning on most tasks with well under one percent of the parameters, adds two
    thin products to each adapted layer while training, and costs nothing once merged.

    Args:
        r: the rank; r (in + out) parameters train for each matrix.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an element of the adapter's input while training. It needs a layer that is
            called with activations (Linear, Conv1D, Conv1d/2d/3d); an embedding has no such input and takes none.
        targets, exclude, trainable, name: see :class:`lightning_peft.PEFTMethod`.
        use_rslora: scale by alpha / sqrt(r) instead (arXiv:2312.03732).
        rank_pattern: other ranks by pattern, as in ``{"q_proj": 4, "re:.*layers\\.0\\..*": 16}``; the last match wins.
        alpha_pattern: other alphas, likewise.
        bias: base biases to train: ``"none"``, ``"lora_only"`` (of the adapted layers) or ``"all"``.
        init: ``"kaiming"`` (A uniform as in ``nn.Linear``, B zero) or ``"gaussian"`` (A normal with standard
            deviation 1/r, B zero); an embedding has A zero and B normal instead.
        **options: ``seed``, ``adapter_dtype``, ``train_norm_stats``, ``audit`` of
            :class:`lightning_peft.PEFTMethod`.

    Raises:
        ValueError: a rank below 1 or above both sides of the matrix, a dropout outside [0, 1), or a dropout on a
            weight that is not called with activations.

    Example::

        trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    may_change = WeightMethod.may_change | {"dropout", "bias", "init"}

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        trainable: str | Sequence[str] = (),
        name: str = "default",
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        bias: Literal["none", "lora_only", "all"] = "none",
        init: Literal["kaiming", "gaussian"] = "kaiming",
        **options: Any,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, trainable=trainable, name=name, **options)
        positive_int("r", r)
        probability("dropout", dropout)
        one_of("bias", bias, ("none", "lora_only", "all"))
        one_of("init", init, ("kaiming", "gaussian"))
        for pattern, rank in (rank_pattern or {}).items():
            positive_int(f"rank_pattern[{pattern!r}]", rank)
        for argument, value in [("alpha", alpha), *(alpha_pattern or {}).items()]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value == 0:
                raise ValueError(f"{argument} must be a finite number other than 0, got {value!r}")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.rank_pattern = dict(rank_pattern or {})
        self.alpha_pattern = dict(alpha_pattern or {})
        self.bias = bias
        self.init = init

    def build(self, site: Site) -> LoRAAdapter:
        r = _last_match(self.rank_pattern, site, self.r)
        alpha = _last_match(self.alpha_pattern, site, self.alpha)
        smaller, larger = sorted(site.shape[-2:])
        if r > larger:
            raise ValueError(
                f"r={r} is above both sides of {site.name!r} ({'x'.join(map(str, site.shape))}), whose rank is at most "
                f"{smaller}: lower r, exclude the layer, or give it its own: rank_pattern={{'{site.name}': {smaller}}}"
            )
        if self.dropout and not site.layout.has_activation:
            raise ValueError(
                f"dropout={self.dropout} cannot be had on {site.name!r}, whose module reads the weight instead of "
                "calling a layer: set dropout=0, or exclude it and add a second LoRA with dropout=0 for it"
            )
        scale = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        return LoRAAdapter(site, r, scale, self.dropout, self.init)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        names = {
            part.site_name: model.get_submodule(host) for host, _, adapter, _ in plan.attach for part in _parts(adapter)
        }
        for argument in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, argument):
                if not any(match(pattern, name, module) for name, module in names.items()):
                    raise TargetError(f"{argument}: {no_match(pattern, names)}")
        for _, _, adapter, _ in plan.attach:
            for part in _parts(adapter):
                largest = min(part.lora_A.shape[-1], part.lora_B.shape[-2])
                if part.r > largest:
                    plan.notes.append(f"{part.site_name}: r={part.r} where the weight's rank is at most {largest}")
        adapted = {  # the modules that hold the weights: an attention's out_proj is one of its own
            f"{host}.{part.parameter}".rpartition(".")[0].lstrip(".")
            for host, _, adapter, _ in plan.attach
            for part in _parts(adapter)
        }
        for name, module in base_modules(model):
            wanted = self.bias == "all" or (self.bias == "lora_only" and name in adapted)
            for parameter, value in module._parameters.items() if wanted else ():
                if value is not None and parameter.endswith("bias"):
                    plan.train[f"{name}.{parameter}" if name else parameter] = "bias trains"
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        assert isinstance(adapter, LoRAAdapter)
        return f"LoRA r={adapter.r} scale={adapter.scale:g}"


class LoRAAdapter(WeightAdapter):
    """A and B of one matrix: ``lora_A`` (..., r, in) and ``lora_B`` (..., out, r)."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float = 0.0, init: str = "kaiming") -> None:
        super().__init__(site)
        *batch, rows, columns = site.shape
        self.r = r
        self.scale = scale
        self.dropout = dropout if not isinstance(site.layout, EmbeddingLayout) else 0.0
        self.lora_A = nn.Parameter(torch.zeros(*batch, r, columns))
        self.lora_B = nn.Parameter(torch.zeros(*batch, rows, r))
        if isinstance(site.layout, EmbeddingLayout):
            nn.init.normal_(self.lora_B)
        elif init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            bound = 1 / math.sqrt(columns)  # kaiming_uniform_ with a = sqrt(5), for each matrix of a batch
            nn.init.uniform_(self.lora_A, -bound, bound)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.lora_B @ self.lora_A) * self.scale

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def down(x: Tensor, a: Tensor) -> Tensor:
            return self.layout.down(host, x, a)

        if self.dropout and self.training:
            h = dropped(down, x, self.lora_A, self.dropout)
        else:
            h = down(x, self.lora_A)
        return self.layout.up(host, h, self.lora_B, y, self.scale)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}"


def _parts(adapter: Adapter) -> list[LoRAAdapter]:
    return [part for part in adapter.weights().values() if isinstance(part, LoRAAdapter)]


def _last_match(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
    for pattern, value in patterns.items():
        if match(pattern, site.name, site.module):
            default = value
    return default
