"""SSF: scaling and shifting the features after each operation.

    y' = gamma * y + beta,    gamma, beta in R^out

after linear, convolution and norm layers. Only gamma and beta train: 2 out parameters per layer. They start at one and
zero, so the adapted model initially computes what the base computes. Merging replaces the layer's weight and bias by
gamma W and gamma b + beta.

Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv:2210.08823.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.frozen_parts import in_frozen_part
from lightning_peft.core.targeting.layouts import NormLayout
from lightning_peft.core.targeting.sites import Site, find_sites, norm_sites, output_head, weight_sites
from lightning_peft.methods.families.weight import WeightMethod, check_bias
from lightning_peft.methods.shared.norm_offset import norm_offset

__all__ = ["SSF"]


class SSF(WeightMethod):
    """Scales and shifts the outputs of linear, convolution and norm layers (Lian et al. 2022, arXiv:2210.08823).

    Choose it for vision models (transformers or convolutional networks) when inference must cost nothing extra: it
    merges completely, and trains about twice as many parameters as the model has biases. It costs memory for one more
    activation per adapted layer in training.

    Norm layers that cannot have a bias (RMSNorm) get a scale only. Norm layers that multiply by 1 + weight (Gemma's)
    are detected by running them. Norm layers without a weight are not adapted, since there is nothing to merge into.

    Args:
        targets: ``"all-layers"`` (every linear, convolution and norm layer and the projections of
            ``nn.MultiheadAttention``, except the output head and the modules in ``trainable``), ``"all-norms"``,
            ``"all-linear"``, or patterns.
        init: ``"identity"`` (scales one, shifts zero) or ``"normal"`` (adds noise with standard deviation 0.02, as the
            paper's code does; the adapted model then differs from its base at the start).

    Raises:
        TargetError: if a pattern matches nothing.
        ValueError: if a layer cannot have a shift (an embedding, a bare parameter), or the output of a norm layer is
            not a multiple of its weight.

    Example::

        trainer = L.Trainer(callbacks=[lp.SSF(trainable=["head"])])
    """

    parameter_count = "two numbers per feature"
    resume_may_differ = WeightMethod.resume_may_differ | {"init"}

    targets: str | Sequence[str] = field(default="all-layers", kw_only=False)
    init: Literal["identity", "normal"] = "identity"

    def find(self, model: nn.Module, heads: list[str]) -> tuple[dict[str, Site], list[str]]:
        sites = weight_sites(model)
        layers = {name: replace(site, linear_like=site.bias is not None) for name, site in sites.items()}
        head = output_head(model, layers)  # also in a convolutional network, where it is the only linear layer
        norms = norm_sites(model)
        # Sort norm layers and other layers together by their order in the model.
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        sites = dict(sorted({**sites, **norms}.items(), key=lambda item: order[item[1].host]))
        left_alone = in_frozen_part(model)

        def shiftable(candidates: Iterable[str]) -> list[str]:
            names = [n for n in candidates if n != head and not left_alone(n) and not is_within(n, *heads)]
            return [n for n in names if n not in norms or norm_offset(norms[n].module) is not None]

        words = {
            "all-layers": lambda: shiftable(n for n, s in sites.items() if n in norms or s.bias is not None),
            "all-norms": lambda: shiftable(n for n in sites if n in norms),
        }
        chosen, left_out = find_sites(model, self.targets, self.exclude, heads, sites, words)
        if head is not None and head not in chosen and head not in left_out:
            left_out.append(head)
        return chosen, left_out

    def build(self, site: Site) -> WeightAdapter:
        check_bias(site)
        norm = isinstance(site.layout, NormLayout)
        if site.bias is None and not norm:
            raise ValueError(
                f"{site.name!r} ({original_class(site.module).__name__}) cannot have a shift: SSF adapts linear, "
                "convolution and norm layers only. Exclude it"
            )
        offset = norm_offset(site.module) if norm else 0.0
        if offset is None:
            raise ValueError(
                f"the output of {site.name!r} ({original_class(site.module).__name__}) is not a multiple of its "
                "weight, so a scale could not be merged: exclude it"
            )
        return ScaleShift(site, offset, shifts=site.bias is not None, init=self.init)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        shiftless = [a.shown for a in plan.attach if getattr(a.adapter, "shift", 0) is None]
        if shiftless:
            plan.notes.append(
                f"{len(shiftless)} norm layers cannot have a bias and get only a scale ({shiftless[0]}, ...)"
            )
        adapted = {a.host for a in plan.attach}
        strange = [n for n, s in norm_sites(model).items() if n not in adapted and norm_offset(s.module) is None]
        if strange:
            plan.notes.append(f"{', '.join(strange[:3])}: not adapted, the output is not a multiple of the weight")
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        assert isinstance(adapter, ScaleShift)
        return "SSF scale and shift" if adapter.shift is not None else "SSF scale"


class ScaleShift(WeightAdapter):
    """``scale`` and ``shift`` of one layer, each (out,).

    Args:
        site: the weight.
        offset: c if the layer multiplies by (weight + c).
        shifts: True if the layer can have a bias.
        init: see :class:`SSF`.
    """

    neutral = {"scale": 1.0, "shift": 0.0}

    def __init__(self, site: Site, offset: float = 0.0, shifts: bool = True, init: str = "identity") -> None:
        super().__init__(site)
        self.offset = offset
        self.bias_shape = site.weight.shape if isinstance(site.layout, NormLayout) else site.shape[:1]
        self.scale = nn.Parameter(torch.ones(site.shape[0]))
        self.shift = nn.Parameter(torch.zeros(site.shape[0])) if shifts else None
        for parameter, mean in ((self.scale, 1.0), (self.shift, 0.0)):
            if init == "normal" and parameter is not None:
                nn.init.normal_(parameter, mean, 0.02)

    def transform(self, weight: Tensor) -> Tensor:
        scale = self.scale.unsqueeze(-1)
        return weight * scale if not self.offset else weight * scale + self.offset * (scale - 1)

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.shift is None:
            return bias
        shift = self.shift.view(self.bias_shape)
        return shift if bias is None else bias * self.scale.view(self.bias_shape) + shift

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # Multiply in the scale's dtype: half precision would round scales close to one to exactly one.
        changed = y * self.layout.features(host, self.scale)
        if self.shift is not None:
            changed = changed + self.layout.features(host, self.shift)
        return changed.to(y.dtype)
