"""SSF: scaling and shifting the features after each operation.

    y' = gamma * y + beta,    gamma, beta in R^out

after linear, convolution and norm layers. Only gamma and beta train: 2 out parameters for each. They start at one
and zero, so the adapted model starts as its base. After a layer with a weight and a bias the two are a change of
these, gamma W and gamma b + beta, so all of it merges.

Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv:2210.08823.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

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

__all__ = ["SSF"]


class SSF(WeightMethod):
    """SSF (Lian et al. 2022, arXiv:2210.08823): a scale and a shift after linear, convolution and norm layers.

    Choose it for vision models, transformers and convolutional networks alike, when nothing may be added at
    inference: it merges without a trace, and trains about as many parameters as the model has biases, twice. It costs
    little beyond the activations it keeps for the backward pass (one more per adapted layer).

    Args:
        targets: ``"all-layers"`` (every linear, convolution and norm layer and the projections of
            ``nn.MultiheadAttention``, but the output head and what ``trainable`` trains), ``"all-norms"``,
            ``"all-linear"``, or patterns.
        init: ``"identity"`` (scales one, shifts zero) or ``"normal"`` (around these with standard deviation 0.02, as in
            the paper's code: *not* the base's function at the start).

    A norm layer that cannot have a bias (RMSNorm) gets the scale only. One that multiplies by 1 + weight (Gemma's)
    is recognised by a trial run. Norm layers without a weight have nothing to merge into and are left alone.

    Raises:
        TargetError: a pattern matches nothing.
        ValueError: a layer that has no place for a shift (an embedding, a bare parameter), or a norm layer whose
            output is no simple function of its weight.

    Example::

        trainer = L.Trainer(callbacks=[lp.SSF(trainable=["head"])])
    """

    resume_may_differ = WeightMethod.resume_may_differ | {"init"}

    targets: str | Sequence[str] = field(default="all-layers", kw_only=False)
    init: Literal["identity", "normal"] = "identity"

    def find(self, model: nn.Module, heads: list[str]) -> tuple[dict[str, Site], list[str]]:
        sites = weight_sites(model)
        layers = {name: replace(site, linear_like=site.bias is not None) for name, site in sites.items()}
        head = output_head(model, layers)  # of a convolutional network too, where it is the one linear layer
        norms = norm_sites(model)
        # In model order, with a norm's weight where its module stands.
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        sites = dict(sorted({**sites, **norms}.items(), key=lambda item: order[item[1].host]))
        left_alone = in_frozen_part(model)

        def shiftable(candidates: Iterable[str]) -> list[str]:
            names = [n for n in candidates if n != head and not left_alone(n) and not is_within(n, *heads)]
            return [n for n in names if n not in norms or _offset(norms[n].module) is not None]

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
                f"{site.name!r} ({original_class(site.module).__name__}) has no place for a shift: SSF adapts linear, "
                "convolution and norm layers; exclude it"
            )
        offset = _offset(site.module) if norm else 0.0
        if offset is None:
            raise ValueError(
                f"{site.name!r} ({original_class(site.module).__name__}) gives an output that is no simple function of "
                "its weight, so that a scale could not be merged: exclude it"
            )
        return ScaleShift(site, offset, shifts=site.bias is not None, init=self.init)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        shiftless = [a.shown for a in plan.attach if getattr(a.adapter, "shift", 0) is None]
        if shiftless:
            plan.notes.append(
                f"{len(shiftless)} norm layers cannot have a bias and get a scale only ({shiftless[0]}, ...)"
            )
        adapted = {a.host for a in plan.attach}
        strange = [n for n, s in norm_sites(model).items() if n not in adapted and _offset(s.module) is None]
        if strange:
            plan.notes.append(f"{', '.join(strange[:3])}: left as it is, no simple function of its weight")
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        assert isinstance(adapter, ScaleShift)
        return "SSF scale and shift" if adapter.shift is not None else "SSF scale"


class ScaleShift(WeightAdapter):
    """``scale`` and ``shift`` of one layer, each (out,).

    Args:
        site: the weight.
        offset: what the layer adds to its weight before it multiplies by it.
        shifts: whether the layer can have a bias.
        init: see :class:`SSF`.
    """

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
        # In the scale's own type, since half precision would round a scale near one away; back to that of y.
        changed = y * self.layout.features(host, self.scale)
        if self.shift is not None:
            changed = changed + self.layout.features(host, self.shift)
        return changed.to(y.dtype)


_TORCH_NORMS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization")


@torch.no_grad()
def _offset(norm: nn.Module) -> float | None:
    """c where a norm layer multiplies by (weight + c), found by running it; None where it does something else."""
    if any(c.__module__ in _TORCH_NORMS for c in original_class(norm).__mro__):
        return 0.0
    size = norm.get_parameter("weight").shape[0]
    here: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}  # whatever a strategy has set
    x = torch.linspace(-1.0, 2.0, 2 * size, **here).view(2, size)

    def run(value: float) -> Tensor:
        parameters = {n: torch.zeros(p.shape, **here) for n, p in norm._parameters.items() if p is not None}
        return torch.func.functional_call(
            norm, {**parameters, "weight": torch.full((size,), value, **here)}, (x,)
        ).float()

    try:
        at_zero, at_one, at_two = run(0.0), run(1.0), run(2.0)
    except Exception:  # whatever else it needs: then it is nothing we know
        return None
    slope = at_one - at_zero
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * slope, atol=1e-5) and torch.allclose(
            at_two, (offset + 2) * slope, atol=1e-5
        ):
            return offset
    return None
