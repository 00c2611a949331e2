"""Save and restore the states of random number generators (RNGs), in this process and across ranks.

Lightning restores weights, optimizer, schedulers and progress, but not the RNG states that dropout and augmentation
use. :mod:`lightning_peft.trainer.resume.dataloaders` restores a dataloader's position inside an epoch.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch

__all__ = ["SavedRNGState", "gather_ranks", "rng_state", "set_rng_state", "this_rank"]


def rng_state(cuda: bool = True) -> dict[str, Any]:
    """The RNG states of this process (torch, numpy, python), as tensors and plain values.

    Args:
        cuda: Include the current CUDA device. Must be False in a worker process, which cannot use CUDA after a fork.
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
    """Set the RNGs to states that :func:`rng_state` returned. RNGs that ``state`` does not name are unchanged."""
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
    """Collect ``state`` from all ranks, for a checkpoint that only rank 0 writes. All ranks must call this together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def this_rank(states: list[Any]) -> Any:
    """This rank's entry of the result of :func:`gather_ranks`; None, with a warning, if the number of ranks changed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if len(states) != world:
        warnings.warn(
            f"the checkpoint was saved by {len(states)} processes, but {world} resume it, so their random number "
            f"generators are not restored. For an exact resume, use {len(states)} processes",
            stacklevel=2,
        )
        return None
    return states[rank]


class SavedRNGState:
    """Holds the RNG states of the checkpoint that a run resumes from, until they are restored."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    @property
    def waiting(self) -> bool:
        """Whether a checkpoint was loaded, but its RNG states are not restored yet."""
        return self._state is not None

    def load(self, states: list[Any]) -> None:
        """Remember this rank's entry of the ``states`` that :func:`gather_ranks` collected."""
        self._state = this_rank(states)

    def restore(self, trainer: Any) -> None:
        """Restore the RNG states of the checkpoint. Only the first call after :meth:`load` has an effect."""
        state, self._state = self._state, None
        if state is None:
            return
        set_rng_state(state)
        fit = trainer.fit_loop
        if fit._combined_loader is not None and fit._combined_loader_states_to_load:
            # Lightning restores loaders only from checkpoints inside an epoch. At the end of one, the generators of
            # samplers and datasets must be restored too, or the next epoch would draw another order.
            fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)
            fit._combined_loader_states_to_load = []
