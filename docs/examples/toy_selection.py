"""An example of a selection method: train the parameters with the fewest elements."""

from __future__ import annotations

from torch import nn

import lightning_peft as lp


class Smallest(lp.SelectionMethod):
    """Trains every parameter of the base that has at most ``elements`` entries."""

    elements: int = 64

    def choose(self, model: nn.Module, plan) -> None:
        for name, parameter in model.named_parameters():
            if parameter.numel() <= self.elements:
                plan.train[name] = "small enough"
