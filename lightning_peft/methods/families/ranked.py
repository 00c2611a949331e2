"""Weight methods with a rank and a scale, which patterns can override per layer, and their dropout of output
features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.sharded_tensors import distribute_like
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import as_dict, each, nonzero, positive_int, probability
from lightning_peft.methods.families.weight import WeightMethod

__all__ = ["RankDropAdapter", "RankOnlyMethod", "RankedMethod", "RowDropMethod"]


class RankOnlyMethod(WeightMethod):
    """Base class of the weight methods with a rank and no scale.

    Args:
        r: rank of the update.
        rank_pattern: ranks for the weights that a pattern matches, for example
            ``{"q_proj": 4, "re:.*layers\\.0\\..*": 16}``; the last match wins.

    Raises:
        ValueError: if a rank is below 1.
    """

    #: the arguments that map patterns to values
    pattern_arguments: ClassVar[tuple[str, ...]] = ("rank_pattern",)

    r: int = field(default=8, validator=positive_int, kw_only=False)
    rank_pattern: Mapping[str, int] | None = field(default=None, validator=each(positive_int), converter=as_dict)

    def rank_at(self, site: Site) -> int:
        """The rank of the adapter at ``site``."""
        return _last_match(self.rank_pattern or {}, site, self.r)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        parts = {
            part.site_name: model.get_submodule(a.host)
            for a in plan.attach
            for part in a.adapter.modules()
            if isinstance(part, WeightAdapter)
        }
        for argument in self.pattern_arguments:
            for pattern in getattr(self, argument):
                if not any(match(pattern, name, module) for name, module in parts.items()):
                    raise TargetError(f"{argument}: {no_match(pattern, parts)}")
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        sizes = (f"{name}={getattr(adapter, name):g}" for name in ("r", "scale") if hasattr(adapter, name))
        return " ".join((super().describe(adapter), *sizes))


class RankedMethod(RankOnlyMethod):
    """Base class of the weight methods with a rank and a scale.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        alpha_pattern: alphas for the weights that a pattern matches, in the form of ``rank_pattern``.

    Raises:
        ValueError: if a rank is below 1, or an alpha is 0 or not finite.
    """

    pattern_arguments = ("rank_pattern", "alpha_pattern")

    alpha: float = field(default=8, validator=nonzero, kw_only=False)
    alpha_pattern: Mapping[str, float] | None = field(default=None, validator=each(nonzero), converter=as_dict)

    def scale_at(self, site: Site) -> float:
        """The factor of the update at ``site``."""
        return _last_match(self.alpha_pattern or {}, site, self.alpha) / self.rank_at(site)


def _last_match(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
    for pattern, value in patterns.items():
        if match(pattern, site.name, site.module):
            default = value
    return default


class RowDropMethod(RankedMethod):
    """Base class of the ranked methods with dropout of output features or of the whole update.

    Args:
        rank_dropout: probability of dropping an output feature of the update during training.
        module_dropout: probability of dropping a layer's whole update in a training step.
        rank_dropout_scale: divide the remaining output features by the fraction that remains, as Hugging Face PEFT
            always does.
    """

    resume_may_differ = RankedMethod.resume_may_differ | {"rank_dropout", "module_dropout", "rank_dropout_scale"}

    rank_dropout: float = field(default=0.0, validator=probability)
    module_dropout: float = field(default=0.0, validator=probability)
    rank_dropout_scale: bool = False

    @property
    def drops(self) -> tuple[float, float, bool]:
        """The arguments of :class:`RankDropAdapter` after the site."""
        return self.rank_dropout, self.module_dropout, self.rank_dropout_scale


class RankDropAdapter(WeightAdapter):
    """An adapter with dropout of output features or of the whole update.

    Args:
        site: the weight to adapt.
        rank_dropout: probability of dropping an output feature.
        module_dropout: probability of dropping the update in one forward pass.
        rank_dropout_scale: divide the remaining output features by the fraction that remains.
    """

    def __init__(self, site: Site, rank_dropout: float, module_dropout: float, rank_dropout_scale: bool) -> None:
        super().__init__(site)
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.rank_dropout_scale = rank_dropout_scale
        self.rows = site.shape[-2]

    def drops(self, like: Tensor) -> Tensor | None:
        """A factor for each output feature of the update, (out,) or a scalar; None if nothing is dropped."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        keep = torch.ones((), device=like.device)
        if self.rank_dropout:
            keep = (torch.rand(self.rows, device=like.device) >= self.rank_dropout).float()
            if self.rank_dropout_scale:
                keep = keep / keep.mean().clamp_min(1 / self.rows)
        if self.module_dropout:
            keep = keep * (torch.rand((), device=like.device) >= self.module_dropout)
        return distribute_like(keep, like)
