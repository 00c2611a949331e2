"""Norm tuning: only the scale and shift of the norm layers train.

    y = g' * (x - mean) / std + b',    g' and b' trained

For LayerNorm, RMSNorm (g' alone), BatchNorm, GroupNorm and InstanceNorm: 2 d parameters for a norm over d features,
d for an RMSNorm.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv:2312.11420.
Of BatchNorm: Frankle et al. 2020, "Training BatchNorm and Only BatchNorm", arXiv:2003.00152.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.selection import SelectionMethod

__all__ = ["NormTuning"]


class NormTuning(SelectionMethod):
    """Norm tuning (Zhao et al. 2023, arXiv:2312.11420): the scale and shift of norm layers train, all else is frozen.

    Choose it when the fewest parameters matter, and on models without biases; of convolutional networks with
    BatchNorm it also adapts to a shift of the data. It costs nothing at inference and adds no module, but activations
    are kept for every layer as in full fine-tuning.

    Args:
        targets: ``"all"`` norm layers, or patterns of norm layers or of modules around them.
        exclude: patterns to take away.
        trainable: patterns of modules that train in full; a new head belongs here.
        parts: what of a norm layer trains: ``"all"``, ``"weight"`` (the scale) or ``"bias"`` (the shift).
        train_norm_stats: let the running statistics of BatchNorm move with training; by default they stay those of
            the base, in training as in evaluation.

    Raises:
        TargetError: the model has no norm layer with parameters, or a pattern matches none.

    Example::

        trainer = L.Trainer(callbacks=[lp.NormTuning(trainable=["classifier"])])
    """

    resume_may_differ = SelectionMethod.resume_may_differ | {"parts"}

    parts: Literal["all", "weight", "bias"] = "all"

    def choose(self, model: nn.Module, plan: Plan) -> None:
        if not any(is_norm(module) for module in model.modules()):
            raise TargetError(f"NormTuning finds no norm layer with parameters in {original_class(model).__name__}")
        chosen = self.matching(model, lambda m, key, p: is_norm(m) and self.parts in ("all", key))
        if not chosen:
            raise TargetError(
                f"parts={self.parts!r}: no norm layer of {original_class(model).__name__} has a {self.parts}"
            )
        layers = list(dict.fromkeys(chosen.values()))
        if self.parts == "all":
            plan.train_modules += [name for name in layers if name not in plan.train_modules]
        else:
            plan.train |= dict.fromkeys(chosen, f"norm {self.parts} trains")
        if not self.train_norm_stats:
            with_statistics = [
                n for n in layers if isinstance(getattr(model.get_submodule(n), "running_mean", None), Tensor)
            ]
            plan.hold_statistics += with_statistics


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm layer with parameters: its class or a base of it is named so, all are vectors."""
    named = any("norm" in cls.__name__.lower() for cls in original_class(module).__mro__)
    own = [p for p in module._parameters.values() if p is not None]
    return named and bool(own) and all(p.ndim <= 1 or p.numel() == max(p.shape) for p in own)
