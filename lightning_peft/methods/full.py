"""Full fine-tuning: every parameter of the base trains.

    W' = W after training

The reference that parameter-efficient methods are compared with: what is trained is all of it, P parameters for a
model of P. With ``layer_decay`` the learning rate falls with depth, lr * decay^depth.

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
    """Full fine-tuning: all of the base trains, the baseline of every comparison.

    Choose it when memory allows and there is much data, or to compare: exchanging this one line for another method
    leaves all the rest of the run as it is. It costs the most of all: gradients and optimizer state for every
    parameter (with AdamW three times the model beside the model itself), and checkpoints of the full size.

    Args:
        targets: ``"all"``, or patterns of the modules that train in full.
        exclude: patterns of modules that stay frozen.
        layer_decay: learning rates by depth: the rate is multiplied by this for each block further from the
            output. 1 for one rate everywhere.

    Raises:
        ValueError: a decay outside (0, 1].
        TargetError: a pattern matches nothing; a quantised weight, which cannot train.

    Example::

        trainer = L.Trainer(callbacks=[lp.FullFineTuning(layer_decay=0.8)])
    """

    def choose(self, model: nn.Module, plan: Plan) -> None:
        patterns = self.patterns("all")
        if patterns:
            self.add_modules(model, match_modules(model, patterns, "targets"), plan)
        else:
            self.add_modules(model, [""], plan, in_frozen_part(model))
