"""Full fine-tuning: every parameter of the base trains.

    W' = W after training

It is the baseline for parameter-efficient methods: all P parameters of the model train. With ``layer_decay`` the
learning rate falls with depth, lr * decay^depth.

Discriminative learning rates: Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
arXiv:1801.06146.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.frozen_parts import in_frozen_part
from lightning_peft.core.targeting.patterns import match_modules
from lightning_peft.methods.families.selection import SelectionMethod

__all__ = ["FullFineTuning"]


class FullFineTuning(SelectionMethod):
    """Trains all parameters of the base, as a baseline for the other methods.

    Choose it when you have enough memory and data, or as a baseline: to compare, replace this one line by another
    method and keep the rest of the run. It costs more than any other method: gradients and optimizer state for every
    parameter (with AdamW, three times the size of the model in addition to the model itself), and full-size
    checkpoints.

    Args:
        targets: ``"all"``, or patterns of the modules that train.
        exclude: patterns of modules that stay frozen.
        layer_decay: multiply the learning rate by this factor for each block further from the output; 1 uses one rate
            everywhere.

    Raises:
        ValueError: if layer_decay is outside (0, 1].
        TargetError: if a pattern matches nothing, or a targeted weight is quantised and cannot train.

    Example::

        trainer = L.Trainer(callbacks=[lp.FullFineTuning(layer_decay=0.8)])
    """

    parameter_count = "everything"

    def choose(self, model: nn.Module, plan: Plan) -> None:
        patterns = self.patterns("all")
        if patterns:
            self.add_modules(model, match_modules(model, patterns, "targets"), plan)
        else:
            self.add_modules(model, [""], plan, in_frozen_part(model))
