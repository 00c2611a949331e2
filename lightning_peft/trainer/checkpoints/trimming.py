"""Reduce a state dict to the trainable state, and check that the module's own hooks removed nothing from it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical
from lightning_peft.core.state.state_dict import StateError, state_keys
from lightning_peft.core.targeting.base_modules import holds_shards, local_state_dict

__all__ = ["check_complete", "trim_state"]


def trim_state(model: nn.Module, state: Mapping[str, Tensor], keys: Container[str]) -> dict[str, Tensor]:
    """Return the trainable part of a full state dict, under canonical keys.

    Args:
        model: The adapted module.
        state: The state dict, with the keys that the module uses.
        keys: The keys of the trainable state in canonical form. They are passed in because computing them reads every
            value of the base.

    Raises:
        StateError: if a tensor is missing, or is empty in the state dict but not in the module.
    """
    if state:  # with some strategies only rank 0 collects a state
        check_complete(model, map(canonical, state), f"{original_class(model).__name__}.state_dict")
    kept = {canonical(k): v for k, v in state.items() if canonical(k) in keys}
    for key, value in kept.items():
        if isinstance(value, Tensor) and value.numel() == 0:
            _check_empty(model, key)
    return kept


def _check_empty(model: nn.Module, key: str) -> None:
    """Refuse a tensor without elements, unless the module's own tensor has none either."""
    if holds_shards(model):
        raise StateError(
            f"{key} is not saved: the model is sharded, and this tensor was not gathered, so the checkpoint could not "
            "be loaded. Use a strategy that gathers the full state"
        )
    own = {canonical(k): v for k, v in local_state_dict(model).items()}
    if key in own and own[key].numel():
        raise StateError(
            f"{key} is not saved: {original_class(model).__name__}.state_dict returns it without elements, but it has "
            f"shape {tuple(own[key].shape)} in the module. Change the state_dict or the hook that empties it"
        )


def check_complete(model: nn.Module, keys: Iterable[str], who: str) -> None:
    """Refuse a checkpoint that lacks part of the trainable state.

    Args:
        model: The adapted module.
        keys: The checkpoint's keys, in canonical form.
        who: The name of the function that produced the state, for the message.

    Raises:
        StateError: if a key is missing; the message lists the missing keys.
    """
    expected = state_keys(model)
    missing = sorted(expected - set(keys))
    if missing:
        few = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise StateError(
            f"{who} leaves {len(missing)} of {len(expected)} trainable tensors out of the checkpoint ({few}), so it "
            "could not be loaded. Checkpoints already hold the trainable state only: remove the code that trims them"
        )
