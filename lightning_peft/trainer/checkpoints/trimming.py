"""Compare what a module's own hooks leave in a checkpoint with the state that must be there."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical
from lightning_peft.core.state.state_dict import StateError, state_keys

__all__ = ["check_complete", "trim_state"]


def trim_state(model: nn.Module, state: Mapping[str, Tensor], keys: Container[str]) -> dict[str, Tensor]:
    """The trainable part of a full state dict, under canonical keys.

    Args:
        model: the adapted module.
        state: by the names that the module gives.
        keys: of the trainable state, in canonical form. To find them reads all values of the base.

    Raises:
        StateError: a tensor is missing, or empty, as a sharded parameter that was never gathered is.
    """
    if state:  # other ranks than the first may have none
        check_complete(model, map(canonical, state), f"{original_class(model).__name__}.state_dict")
    kept = {canonical(k): v for k, v in state.items() if canonical(k) in keys}
    for key, value in kept.items():
        if isinstance(value, Tensor) and value.numel() == 0:
            raise StateError(f"refusing to save {key}: it holds no values (a sharded tensor that was not gathered?)")
    return kept


def check_complete(model: nn.Module, keys: Iterable[str], who: str) -> None:
    """Refuse a checkpoint without parts of the trainable state.

    Args:
        model: the adapted module.
        keys: what the checkpoint has, in canonical form.
        who: whose code left the rest out.

    Raises:
        StateError: names what is missing.
    """
    expected = state_keys(model)
    missing = sorted(expected - set(keys))
    if missing:
        few = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise StateError(
            f"{who} leaves {len(missing)} of {len(expected)} tensors of the trainable state out of the checkpoint "
            f"({few}), so that it could not be loaded. Checkpoints hold what trains and nothing else already: remove "
            "the code that trims them"
        )
