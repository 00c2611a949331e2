"""The weights of recurrent layers: ``nn.RNN``, ``nn.LSTM``, ``nn.GRU``, and the cells that run one step.

Each weight of each layer and direction is a separate matrix: ``weight_ih_l0``, ``weight_hh_l0``, ``weight_hr_l0``
(with ``proj_size``), their ``_reverse``, and a cell's ``weight_ih`` and ``weight_hh``. The gates that share a weight
are blocks of its output features.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.targeting.layouts import WeightLayout

__all__ = ["RecurrentLayout", "recurrent_weights"]


class RecurrentLayout(WeightLayout):
    """A weight that a recurrent layer multiplies by in every step: stored as W, and read by the layer itself."""


def recurrent_weights(module: nn.Module) -> list[str]:
    """The names of the weight matrices of a recurrent layer or cell; empty for other modules."""
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight_")]
    return ["weight_ih", "weight_hh"] if isinstance(module, nn.RNNCellBase) else []
