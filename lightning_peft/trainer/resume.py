"""Stop and resume bit for bit: random streams in the checkpoint, and the dataloader back at its batch.

Lightning restores weights, optimizer, schedulers and progress. What it leaves out is the state of the random number
generators (dropout) and the order of an epoch that is under way (shuffling): after a stop in the middle it would
start the epoch's data over. Here the streams are stored with the checkpoint, and the loader stores the stream's
state from before it drew the epoch's order, so that the same order is drawn again and the batches already seen
are skipped.

Random numbers drawn inside loader worker processes are not part of this.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.core.swap import add_mixin

__all__ = ["ResumableLoader", "gather", "make_resumable", "rng_state", "set_rng_state"]


def rng_state() -> dict[str, Any]:
    """The state of this process's generators (torch, numpy, python), in tensors and plain values."""
    import numpy as np

    version, python, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the stream that libraries still share
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(keys.astype("int64")), *rest],
        "python": [version, list(python), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to where :func:`rng_state` saw them."""
    import numpy as np

    torch.set_rng_state(state["torch"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))  # noqa: NPY002
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def gather(state: dict[str, Any] | None) -> list[Any]:
    """The states of all ranks, for a checkpoint that only rank 0 writes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def mine(states: list[Any]) -> Any:
    """This rank's part of what :func:`gather` collected; None where the number of ranks has changed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if len(states) != world:
        warnings.warn(
            f"the checkpoint was saved by {len(states)} processes and is resumed by {world}: random streams start anew",
            stacklevel=2,
        )
        return None
    return states[rank]


class ResumableLoader(DataLoader):
    """Mixin of a training DataLoader that can go on in the middle of an epoch."""

    _peft_trainer: Any = None
    _epoch_rng: dict[str, Any] | None = None
    _rewind_to: dict[str, Any] | None = None
    _skip = 0

    def __iter__(self) -> Iterator[Any]:
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn before the first batch is asked for: by then the trainer has
        # restored its progress, and the streams stand where they stood without a stop.
        rewind, self._rewind_to = self._rewind_to, None
        done = self._peft_trainer.fit_loop.epoch_loop.batch_progress.current.ready if rewind is not None else 0
        now = rng_state()
        if done and rewind is not None:
            set_rng_state(rewind)
        self._epoch_rng = rng_state()
        countable = not isinstance(self.dataset, IterableDataset)  # type: ignore[attr-defined]
        self._skip = done if countable else 0
        batches = super().__iter__()
        if done:
            batches = itertools.chain([next(batches)], batches) if countable else itertools.islice(batches, done, None)
            set_rng_state(now)
        yield from batches

    @property
    def _index_sampler(self) -> Any:
        # Skipping indices instead of batches: the data that was seen before is not loaded again.
        sampler = super()._index_sampler
        return _SkipFirst(sampler, self._skip) if self._skip else sampler

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_rng": gather(self._epoch_rng)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rewind_to = mine(state["epoch_rng"])


class _SkipFirst:
    def __init__(self, sampler: Any, skip: int) -> None:
        self.sampler = sampler
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.sampler), self.skip, None)

    def __len__(self) -> int:
        return len(self.sampler)


def make_resumable(loader: Any, trainer: Any) -> Any:
    """Give a training loader the mixin, unless it can resume by itself (torchdata's ``StatefulDataLoader``)."""
    if isinstance(loader, DataLoader) and not hasattr(loader, "state_dict"):
        add_mixin(loader, ResumableLoader)
        loader._peft_trainer = trainer  # type: ignore[attr-defined]
    return loader
