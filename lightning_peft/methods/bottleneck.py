"""Bottleneck adapters: small two-layer networks after, or parallel to, the sub-layers of a model.

    serial:    y' = y + s W_up f(W_down y)        y: the sub-layer's output
    parallel:  y' = y + s W_up f(W_down x)        x: the sub-layer's input

with W_down (m x d) and W_up (d x m), both with biases: 2 m d + d + m parameters per adapter of width d and bottleneck
m. The adapter applies before the sub-layer's residual sum and norm. On feature maps the two layers are 1x1
convolutions.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751: adapters after attention and
after feed-forward. Pfeiffer et al. 2021, "AdapterFusion", arXiv:2005.00247: after feed-forward only. He et al. 2022,
"Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366: parallel and scaled parallel.
Steitz and Roth 2024, "Adapters Strike Back" (Adapter+), arXiv:2406.06820. The gate: Mao et al. 2022, "UniPELT",
arXiv:2110.07577.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import Attribute, Converter, field
from attrs.converters import pipe
from torch import Tensor, nn

from lightning_peft.core.adapters.activation import ActivationAdapter
from lightning_peft.core.sharded_tensors import distribute_like
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.activation_sites import ActivationSite
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.methods.families.activation import ActivationMethod
from lightning_peft.methods.families.arguments import (
    Check,
    is_number,
    one_of,
    one_or_each,
    optional,
    positive,
    positive_int,
    probability,
)
from lightning_peft.methods.families.declared import target_patterns

__all__ = ["BottleneckAdapter"]


def _preset(
    targets: str | list[str],
    parallel: bool,
    reduction_factor: float,
    non_linearity: str,
    scaling: float | str = 1.0,
    init: str = "zero",
    stochastic_depth: float = 0.0,
) -> dict[str, Any]:
    return dict(locals())


PRESETS = {
    "houlsby": _preset(["all-attention", "all-feedforward"], False, 16, "swish"),
    "pfeiffer": _preset("all-feedforward", False, 16, "relu"),
    "parallel": _preset("all-feedforward", True, 2, "relu"),
    "scaled_parallel": _preset("all-feedforward", True, 2, "relu", scaling=4.0),
    "adapterplus": _preset("all-feedforward", False, 96, "gelu", "channel", "houlsby", stochastic_depth=0.1),
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
}


def _or_preset(value: Any, method: Any, argument: Attribute[Any]) -> Any:
    if value is not None or (argument.name == "reduction_factor" and method.bottleneck_size is not None):
        return value
    one_of(*PRESETS).require("preset", method.preset)
    return PRESETS[method.preset][argument.name]


def _is_scaling(value: Any) -> bool:
    return value in ("learned", "channel") or (is_number(value) and value != 0)


or_preset = Converter(_or_preset, takes_self=True, takes_field=True)  # type: ignore[misc]


class BottleneckAdapter(ActivationMethod):
    """Bottleneck adapters (Houlsby, Pfeiffer, parallel, AdapterPlus) on the sub-layers of any model (arXiv:1902.00751).

    Choose it when the task is far from what the base was trained for, or when you want to combine several adapters: the
    adapters are non-linear, and often work where a LoRA of the same size does not. They cost 2 m d + d + m parameters
    each and two small layers per adapted module at inference, because they cannot be merged. That is 4 to 6 % more time
    for BERT (arXiv:2010.11918); :func:`lightning_peft.adapter_drop` reduces it.

    Args:
        preset: ``"houlsby"`` (arXiv:1902.00751), ``"pfeiffer"`` (2005.00247), ``"parallel"`` or ``"scaled_parallel"``
            (2110.04366), ``"adapterplus"`` (2406.06820). It sets the seven arguments that follow; explicit arguments
            override the preset.
        targets: ``"all-attention"``, ``"all-feedforward"``, ``"all-blocks"`` or patterns of modules, as in
            :class:`lightning_peft.ActivationMethod`.
        reduction_factor: the bottleneck is the width divided by this number. A mapping sets it by pattern of the
            adapted module, for example ``{"default": 16, "re:.*layers\\.0\\..*": 8}``; the last match wins.
        parallel: compute the adapter on the sub-layer's input instead of its output.
        non_linearity: ``"relu"``, ``"gelu"``, ``"swish"`` (``"silu"``), ``"tanh"``, ``"leaky_relu"`` or ``"linear"``.
        scaling: factor of the adapter's output: a number, ``"learned"`` (one trained number, initially 1) or
            ``"channel"`` (one trained number per feature, initially 1).
        init: ``"zero"`` (W_down uniform as in ``nn.Linear``, W_up and biases zero: the adapted model starts equal to
            the base), ``"houlsby"`` (both truncated normal with standard deviation 0.01: it starts close to the base)
            or ``"bert"`` (both normal with standard deviation 0.02: it does not start equal to the base).
        stochastic_depth: probability of skipping the adapter for an example of the batch during training.
        bottleneck_size: the bottleneck width m, instead of ``reduction_factor``; a mapping sets it by pattern.
        dropout: dropout probability on the adapter's output.
        norm_before: add a trained layer norm on the adapter's input (2 d more parameters).
        norm_after: add a trained layer norm on the adapter's output (2 d more parameters). With ``init="zero"`` its
            weight starts at zero instead of W_up.
        gate: multiply the adapter's output by a learned sigmoid(w x + b), as in UniPELT (d + 1 more parameters). It is
            computed per position, which keeps causal models causal; UniPELT's code averages it over the sequence.
        exclude, trainable, name, width, channels_first: see :class:`lightning_peft.ActivationMethod`.

    Raises:
        ValueError: if the bottleneck would have no width; if bottleneck_size and reduction_factor are both given; if an
            argument has an unknown value; if a parallel adapter's input and output differ in width (if they differ in
            length, at the first forward pass).
        TargetError: if nothing matches ``targets``, or a pattern of ``bottleneck_size`` or ``reduction_factor`` matches
            no adapted module.

    Example::

        trainer = L.Trainer(callbacks=[lp.BottleneckAdapter("houlsby", bottleneck_size=64, trainable=["classifier"])])
    """

    parameter_count = "2 m d + d + m per location"
    resume_may_differ = ActivationMethod.resume_may_differ | {"dropout", "stochastic_depth", "init"}

    preset: Literal["houlsby", "pfeiffer", "parallel", "scaled_parallel", "adapterplus"] = field(
        default="pfeiffer", kw_only=False
    )
    bottleneck_size: int | Mapping[str, int] | None = field(default=None, validator=optional(one_or_each(positive_int)))
    reduction_factor: float | Mapping[str, float] | None = field(
        default=None, converter=or_preset, validator=optional(one_or_each(positive))
    )
    parallel: bool | None = field(default=None, converter=or_preset)
    non_linearity: Literal["relu", "gelu", "swish", "silu", "tanh", "leaky_relu", "linear"] | None = field(
        default=None, converter=or_preset, validator=one_of(*_FUNCTIONS)
    )
    scaling: float | Literal["learned", "channel"] | None = field(
        default=None,
        converter=or_preset,
        validator=Check("'learned', 'channel' or a finite number other than 0", _is_scaling),
    )
    init: Literal["zero", "houlsby", "bert"] | None = field(
        default=None, converter=or_preset, validator=one_of("zero", "houlsby", "bert")
    )
    stochastic_depth: float | None = field(default=None, converter=or_preset, validator=probability)
    targets: str | Sequence[str] | None = field(  # type: ignore[assignment]
        default=None, converter=pipe(or_preset, target_patterns)
    )
    dropout: float = field(default=0.0, validator=probability)
    norm_before: bool = False
    norm_after: bool = False
    gate: bool = False

    def check(self) -> None:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError(
                "bottleneck_size and reduction_factor both set the bottleneck's width: remove one of the two"
            )

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        places = {a.host: model.get_submodule(a.host) for a in plan.attach if _is_bottleneck(a.adapter)}
        for argument in ("bottleneck_size", "reduction_factor"):
            for pattern in _patterns(getattr(self, argument)):
                if pattern != "default" and not any(match(pattern, name, module) for name, module in places.items()):
                    raise TargetError(f"{argument}: {no_match(pattern, places)}")
        return plan

    def build(self, site: ActivationSite) -> ActivationAdapter:
        size = _last_match(self.bottleneck_size, site)
        if size is None:
            factor = _last_match(self.reduction_factor, site)
            if factor is None:
                argument = "reduction_factor" if self.bottleneck_size is None else "bottleneck_size"
                raise ValueError(f"{argument} has no value for {site.host!r}: add a matching pattern or a 'default'")
            size = int(site.width // factor)
            if size < 1:
                raise ValueError(
                    f"reduction_factor={factor:g} is larger than the {site.width} features of {site.host!r}, so the "
                    "bottleneck would have no width: lower it, or set bottleneck_size"
                )
        if self.parallel and site.input_width not in (None, site.width):
            raise ValueError(
                f"a parallel adapter is not supported on {site.host!r}: its input has {site.input_width} features and "
                f"its output {site.width}. Exclude it, or set parallel=False"
            )
        chosen: Any = self  # the preset has replaced every None, which the declared types still allow
        return Bottleneck(
            site,
            size,
            parallel=chosen.parallel,
            non_linearity=chosen.non_linearity,
            scaling=chosen.scaling,
            init=chosen.init,
            stochastic_depth=chosen.stochastic_depth,
            dropout=self.dropout,
            norm_before=self.norm_before,
            norm_after=self.norm_after,
            gate=self.gate,
        )

    def describe(self, adapter: ActivationAdapter) -> str:
        assert isinstance(adapter, Bottleneck)
        return f"{'parallel' if adapter.reads_input else 'serial'} bottleneck {adapter.size}"


class Bottleneck(ActivationAdapter):
    """One adapter: ``down`` (m x d) and ``up`` (d x m), plus the optional norms and gate."""

    scale: float | Tensor

    def __init__(
        self,
        site: ActivationSite,
        size: int,
        parallel: bool = False,
        non_linearity: str = "relu",
        scaling: float | str = 1.0,
        init: str = "zero",
        stochastic_depth: float = 0.0,
        dropout: float = 0.0,
        norm_before: bool = False,
        norm_after: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__(site)
        self.size = size
        self.reads_input = parallel
        self.non_linearity = non_linearity
        self.stochastic_depth = stochastic_depth
        self.dropout = dropout
        self.down = nn.Linear(site.width, size)
        self.up = nn.Linear(size, site.width)
        self.norm_before = nn.LayerNorm(site.width) if norm_before else None
        self.norm_after = nn.LayerNorm(site.width) if norm_after else None
        self.gate = nn.Linear(site.width, 1) if gate else None
        if isinstance(scaling, str):
            self.scale = nn.Parameter(torch.ones(site.width if scaling == "channel" else 1))
        else:
            self.scale = scaling
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            if init == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            elif init == "bert":
                nn.init.normal_(layer.weight, std=0.02)
        if init == "zero":  # zero only the last factor: with two zero factors neither would get a gradient
            nn.init.zeros_((self.norm_after or self.up).weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x if self.reads_input else y
        if z.shape != y.shape:
            raise ValueError(
                f"a parallel adapter is not supported on {self.site_name!r}: its input has shape {tuple(z.shape)} and "
                f"its output {tuple(y.shape)}. Exclude it, or set parallel=False"
            )
        maps = self.axis != -1 and z.ndim > 2
        # With the channels last, a linear layer computes a 1x1 convolution.
        return y + (self._change(z.movedim(1, -1)).movedim(-1, 1) if maps else self._change(z)).to(y.dtype)

    def neutral_values(self, host: nn.Module) -> Mapping[str, float]:
        last = "up" if self.norm_after is None else "norm_after"  # the layer whose output is added
        return {f"{last}.weight": 0.0, f"{last}.bias": 0.0}

    def _change(self, z: Tensor) -> Tensor:
        h = z if self.norm_before is None else _run(self.norm_before, z)
        h = _run(self.up, _FUNCTIONS[self.non_linearity](_run(self.down, h)))
        if self.norm_after is not None:
            h = _run(self.norm_after, h)
        if self.training and self.stochastic_depth:
            kept = torch.rand(h.shape[0], *[1] * (h.ndim - 1), device=h.device) >= self.stochastic_depth
            h = h * distribute_like(kept.to(h.dtype), h) / (1 - self.stochastic_depth)
        if self.gate is not None:
            h = h * torch.sigmoid(_run(self.gate, z))
        return F.dropout(h * self.scale, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"parallel={self.reads_input}, non_linearity={self.non_linearity}, dropout={self.dropout}"


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a float32 layer of the adapter to ``x``, and return the dtype of ``x``."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x.to(layer.weight.dtype), layer.normalized_shape, layer.weight, layer.bias, layer.eps).to(
            x.dtype
        )
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _is_bottleneck(adapter: nn.Module) -> bool:
    return isinstance(adapter, Bottleneck)


def _patterns(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    return {} if value is None else {"default": value}


def _last_match(value: Any, site: ActivationSite) -> Any:
    patterns = _patterns(value)
    found = patterns.get("default")
    for pattern, given in patterns.items():
        if pattern != "default" and any(match(pattern, name, site.module) for name in (site.name, site.host)):
            found = given
    return found
