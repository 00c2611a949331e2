"""Norm tuning: only the scale and shift of the norm layers train.

    y = g' * (x - mean) / std + b',    g' and b' trained

It supports LayerNorm, RMSNorm (g' only), BatchNorm, GroupNorm and InstanceNorm. 2 d parameters train per norm layer
over d features, and d per RMSNorm.

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
    """Trains the scale and shift of norm layers and freezes everything else (Zhao et al. 2023, arXiv:2312.11420).

    Choose it when you need as few parameters as possible, especially for models without biases. In convolutional
    networks with BatchNorm it can also adapt to a distribution shift. It costs nothing at inference, but stores
    activations for every layer, as full fine-tuning does.

    Args:
        targets: ``"all"`` norm layers, or patterns of norm layers or of modules that contain them.
        exclude: patterns of norm layers that stay frozen.
        trainable: patterns of modules that train in full; name a new head here.
        parts: which parameters of a norm layer train: ``"all"``, ``"weight"`` (the scale) or ``"bias"`` (the shift).
        train_norm_stats: update the running statistics of BatchNorm during training. If False, the base's statistics
            are used in training as well as in evaluation.

    Raises:
        TargetError: if the model has no norm layer with parameters, or a pattern matches none.

    Example::

        trainer = L.Trainer(callbacks=[lp.NormTuning(trainable=["classifier"])])
    """

    parameter_count = "the norms' weights and biases"
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
    """True if a class name of ``module`` or its bases contains "norm", and its parameters are vectors."""
    named = any("norm" in cls.__name__.lower() for cls in original_class(module).__mro__)
    own = [p for p in module._parameters.values() if p is not None]
    return named and bool(own) and all(p.ndim <= 1 or p.numel() == max(p.shape) for p in own)
