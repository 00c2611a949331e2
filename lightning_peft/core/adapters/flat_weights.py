"""How an adapted ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` computes with the values that its adapters give its weights."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.core.adapters.reads import forward_values

__all__ = ["FlatWeights"]


class FlatWeights:
    """Mixin of an adapted ``nn.RNNBase``, whose forward does not read its parameters but a list of them.

    In its own forward the list holds the adapted values, for each call and thread its own; elsewhere it is the stored
    list, which torch keeps in step with the parameters (``flatten_parameters``, ``_apply``, ``__setattr__``). On CUDA
    the adapted values are not one contiguous chunk, so that cuDNN copies them in every call and warns about it once;
    merged weights are written in place and stay contiguous.
    """

    @property
    def _flat_weights(self) -> list[Tensor]:
        state = self.__dict__
        if "_flat_weights" not in state:  # while it is being unpickled
            raise AttributeError("_flat_weights")
        values = forward_values(self)  # type: ignore[arg-type]
        if not values:
            return state["_flat_weights"]
        own = {n: state["_parameters"].get(n, w) for n, w in zip(state["_flat_weights_names"], state["_flat_weights"])}
        return [values.get(n, w) for n, w in own.items()]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        self.__dict__["_flat_weights"] = weights

    def _update_flat_weights(self) -> None:
        # torch looks here for parameters that were replaced, and would take adapted values for such.
        if not forward_values(self):  # type: ignore[arg-type]
            super()._update_flat_weights()  # type: ignore[misc]
