"""Random RNG states in checkpoints: read and set the generators of this process, and of the ranks.

Lightning restores weights, optimizer, schedulers and progress, but not the state of the random number generators
(dropout, augmentation). The position of a dataloader inside an epoch is the subject of
:mod:`lightning_peft.trainer.resume.dataloaders`.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch

__all__ = ["SavedRNGState", "gather_ranks", "rng_state", "set_rng_state", "this_rank"]


def rng_state(cuda: bool = True) -> dict[str, Any]:
    """The state of this process's generators (torch, numpy, python), in tensors and plain values.

    Args:
        cuda: take the current device's too. A worker process must not touch it.
    """
    import numpy as np

    version, python, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the stream that libraries still share
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).view("int32").copy()), *rest],
        "python": [version, list(python), gauss],
    }
    if cuda and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the generators to a state that :func:`rng_state` returned; those that it lacks are left alone."""
    import numpy as np

    if "torch" in state:
        torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.cpu().numpy().view("uint32"), *rest))  # noqa: NPY002
    if "python" in state:
        version, python, gauss = state["python"]
        random.setstate((version, tuple(python), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def gather_ranks(state: Any) -> list[Any]:
    """The states of all ranks, for a checkpoint that only rank 0 writes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def this_rank(states: list[Any]) -> Any:
    """This rank's part of what :func:`gather_ranks` collected; None where the number of ranks has changed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if len(states) != world:
        warnings.warn(
            f"the checkpoint was saved by {len(states)} processes and is resumed by {world}: the random number "
            "generators start anew",
            stacklevel=2,
        )
        return None
    return states[rank]


class SavedRNGState:
    """The random RNG states of the checkpoint that a run resumes from, until they are restored."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    @property
    def waiting(self) -> bool:
        """Whether a checkpoint was loaded whose RNG states have not been restored yet."""
        return self._state is not None

    def load(self, states: list[Any]) -> None:
        """Remember this rank's state of those that :func:`gather_ranks` collected."""
        self._state = this_rank(states)

    def restore(self, trainer: Any) -> None:
        """Set the random RNG states to their state in the checkpoint; only the first call after loading one does."""
        state, self._state = self._state, None
        if state is None:
            return
        set_rng_state(state)
        fit = trainer.fit_loop
        if fit._combined_loader is not None and fit._combined_loader_states_to_load:
            # Lightning gives loaders their state in the middle of an epoch only; their generators go on at its end.
            fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)
            fit._combined_loader_states_to_load = []
