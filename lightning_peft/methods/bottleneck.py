"""Bottleneck adapters: small two-layer networks beside or after the sub-layers of a model.

    serial:    y' = y + s W_up f(W_down y)        y: the sub-layer's output
    parallel:  y' = y + s W_up f(W_down x)        x: the sub-layer's input

with W_down (m x d) and W_up (d x m), both with biases: 2 m d + d + m parameters for each adapter of width d and
bottleneck m. It sits before the sub-layer's residual sum and norm. On feature maps the two are 1x1 convolutions.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751: after attention and after
feed-forward. Pfeiffer et al. 2021, "AdapterFusion", arXiv:2005.00247: after feed-forward only. He et al. 2022,
"Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366: parallel, scaled parallel.
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
    """Bottleneck adapters (Houlsby, Pfeiffer, parallel, AdapterPlus) after or beside the sub-layers of any model.

    Choose it when the task is far from what the base was trained for, or when several adapters shall be combined:
    the adapters are non-linear and often hold up where LoRA of the same size does not. They cost 2 m d + d + m
    parameters each, and cannot be merged, so inference runs two more small layers per place (4 to 6 % more
    time for BERT in arXiv:2010.11918; :func:`lightning_peft.adapter_drop` takes some of it back).

    Args:
        preset: ``"houlsby"`` (arXiv:1902.00751), ``"pfeiffer"`` (2005.00247), ``"parallel"`` and ``"scaled_parallel"``
            (2110.04366), ``"adapterplus"`` (2406.06820). It sets the seven arguments that follow; what is given
            explicitly goes before it.
        targets: places as in :class:`lightning_peft.ActivationMethod`: ``"all-attention"``, ``"all-feedforward"``,
            ``"all-blocks"`` or patterns.
        reduction_factor: the bottleneck is the width divided by this. Also by pattern of the place, as in
            ``{"default": 16, "re:.*layers\\.0\\..*": 8}``; the last match wins.
        parallel: take the sub-layer's input instead of its output.
        non_linearity: ``"relu"``, ``"gelu"``, ``"swish"`` (``"silu"``), ``"tanh"``, ``"leaky_relu"`` or ``"linear"``.
        scaling: of the adapter's contribution: a number, ``"learned"`` (one trained number, from 1) or ``"channel"``
            (one for each feature, from 1).
        init: ``"zero"`` (W_down uniform as in ``nn.Linear``, W_up and biases zero: the model starts as its base),
            ``"houlsby"`` (both truncated normal with standard deviation 0.01: close to it) or ``"bert"`` (both normal
            with 0.02: *not* the base's function at the start).
        stochastic_depth: probability of leaving the adapter out for a row of the batch while training.
        bottleneck_size: the bottleneck's width m itself instead of ``reduction_factor``; also by pattern.
        dropout: on the adapter's contribution, while training.
        norm_before: a layer norm of the adapter's own on its input (2 d parameters more).
        norm_after: a layer norm of the adapter's own on its contribution (2 d more); with ``init="zero"`` its weight
            starts at zero instead of W_up.
        gate: multiply the contribution by sigmoid(w x + b), learned, as UniPELT does (d + 1 more). It is computed for
            each position, so that it stays causal; UniPELT's code averages it over the sequence.
        exclude, trainable, name, width, channels_first: see :class:`lightning_peft.ActivationMethod`.

    Raises:
        ValueError: a reduction factor that leaves no width, both ways to give the width, an unknown word;
            a parallel adapter where input and output differ in width (in length: at the first call).
        TargetError: nothing looks like what ``targets`` asks for; a pattern of ``bottleneck_size`` or
            ``reduction_factor`` matches no place.

    Example::

        trainer = L.Trainer(callbacks=[lp.BottleneckAdapter("houlsby", bottleneck_size=64, trainable=["classifier"])])
    """

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
            raise ValueError("give bottleneck_size or reduction_factor, not both: each sets the bottleneck's width")

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
                raise ValueError(f"{argument} has no value for {site.host!r}: add a 'default'")
            size = int(site.width // factor)
            if size < 1:
                raise ValueError(
                    f"reduction_factor={factor:g} leaves no width at {site.host!r}, which has {site.width} features: "
                    "lower it, or set bottleneck_size"
                )
        if self.parallel and site.input_width not in (None, site.width):
            raise ValueError(
                f"a parallel adapter adds what it makes of the input to the output, and {site.host!r} takes "
                f"{site.input_width} features and gives {site.width}: exclude it, or give it a serial adapter"
            )
        chosen: Any = self  # without the None of the types: the preset has replaced it
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
    """One adapter: ``down`` (m x d) and ``up`` (d x m), with what the method's arguments add."""

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
        if init == "zero":  # one zero, not two in a row: neither would get a gradient then
            nn.init.zeros_((self.norm_after or self.up).weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x if self.reads_input else y
        if z.shape != y.shape:
            raise ValueError(
                f"a parallel adapter adds what it makes of the input to the output, and {self.site_name!r} takes "
                f"{tuple(z.shape)} and gives {tuple(y.shape)}: exclude it, or give it a serial adapter"
            )
        maps = self.axis != -1 and z.ndim > 2
        # Feature maps are seen with their features last: a linear layer is then the 1x1 convolution.
        return y + (self._change(z.movedim(1, -1)).movedim(-1, 1) if maps else self._change(z)).to(y.dtype)

    def _change(self, z: Tensor) -> Tensor:
        h = z if self.norm_before is None else _run(self.norm_before, z)
        h = _run(self.up, _FUNCTIONS[self.non_linearity](_run(self.down, h)))
        if self.norm_after is not None:
            h = _run(self.norm_after, h)
        if self.training and self.stochastic_depth:
            kept = torch.rand(h.shape[0], *[1] * (h.ndim - 1), device=h.device) >= self.stochastic_depth
            h = h * kept.to(h.dtype) / (1 - self.stochastic_depth)
        if self.gate is not None:
            h = h * torch.sigmoid(_run(self.gate, z))
        return F.dropout(h * self.scale, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"parallel={self.reads_input}, non_linearity={self.non_linearity}, dropout={self.dropout}"


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer on ``x``, in the type of ``x``: adapters are kept in float32."""
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
