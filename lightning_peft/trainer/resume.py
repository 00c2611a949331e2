"""Stop and resume bit for bit: random streams in the checkpoint, and the dataloader back at its batch.

Lightning restores weights, optimizer, schedulers and progress. What it leaves out is the state of the random number
generators (dropout, augmentation) and the order of an epoch that is under way (shuffling): after a stop in the middle
it would start the epoch's data over. Here the streams are stored with the checkpoint, and a loader stores the
streams' state from before it drew the epoch's order, so that the same order is drawn again and the batches already
seen are skipped by index: they are not loaded again. Worker processes report their own streams with each batch.

An ``IterableDataset`` has no indices: its batches are drawn again and dropped. In the main process it gets random
streams of its own for each pass, so that the second time it gives the same.

Not covered: a checkpoint after the last batch of a pass whose length is not known, and before its validation, which
Lightning then leaves out; augmentation in ``persistent_workers`` in the epochs after one that was resumed in its
middle; iterables that are no ``DataLoader``, unless they have ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

from lightning_peft.core.swap import add_mixin

__all__ = ["ResumableLoader", "gather", "make_resumable", "mine", "rng_state", "set_rng_state"]


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
    """Put the generators back to where :func:`rng_state` saw them."""
    import numpy as np

    torch.set_rng_state(state["torch"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().view("uint32"), *rest))  # noqa: NPY002
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def gather(state: Any) -> list[Any]:
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
    _peft_restore: Callable[[Any], None]
    _pass: dict[str, Any] | None = None  # the pass under way: its streams at the start, batches given, workers' streams
    _resumed: dict[str, Any] | None = None
    _skip = 0

    def __iter__(self) -> Any:
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn before the first batch is asked for: by then the trainer has
        # restored its progress, and the streams stand where they stood without a stop.
        self._peft_restore(self._peft_trainer)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            _set_generators(self, resumed["generators"])
        now = _streams(self)
        if resumed is None or not self._in_the_middle():
            # Persistent workers draw one seed in their life, and their streams go on from pass to pass.
            lasting = resumed["workers"] if resumed is not None and self.persistent_workers else {}
            first = not lasting and getattr(self, "_iterator", None) is None
            resumed = {"start": now, "given": 0, "workers": lasting, "first": first}
        done, workers = resumed["given"], resumed["workers"]
        _set_streams(self, resumed["start"])
        self._pass = resumed

        indexed = not isinstance(self.dataset, IterableDataset)  # type: ignore[attr-defined]
        # Where the length is not known the trainer draws one batch ahead of its step, so that the streams of both
        # are entangled. A worker's stream is known from its first batch on: till then, batches are drawn again.
        apart = not self.num_workers and (not indexed or self._peft_trainer.fit_loop._data_fetcher.length is None)
        self._skip = done if indexed and not apart and done >= self.num_workers else 0
        known = workers if self._skip or not done else {}
        batches: Any = self._started(known, done, resumed["first"])
        own = batches
        if apart:
            batches = _on_own_stream(batches)
        batches = itertools.islice(batches, done - self._skip, None)
        if resumed["start"] is not now:
            # What a pass draws at its start it draws when it is first asked: for an index, or for a batch.
            if self._skip:
                own._sampler_iter = _asked(own._sampler_iter)
            else:
                batches = _asked(batches)
            _set_streams(self, now)
        for i, batch in enumerate(batches, done):
            if indexed and self.num_workers:
                batch, workers[i % self.num_workers] = batch
            resumed["given"] = i + 1
            yield batch

    def _in_the_middle(self) -> bool:
        epoch = self._peft_trainer.fit_loop.epoch_loop
        return epoch.batch_progress.current.ready > 0 and not epoch._num_ready_batches_reached()

    def _started(self, workers: dict[int, Any], done: int, first: bool) -> Iterator[Any]:
        """The loader's own iterator, its workers reporting their streams and starting from those given."""
        collate, init, generator = self.collate_fn, self.worker_init_fn, self.generator
        if not first:
            self.generator = torch.Generator()  # where the pass drew no seed for workers, none is drawn now
        if self.num_workers:
            if not isinstance(self.dataset, IterableDataset):  # type: ignore[attr-defined]
                self.collate_fn = _WithStream(collate)
            # The workers take turns, and the first one now takes the turn after the last batch seen.
            turns = {
                k: workers[turn] for k in range(self.num_workers) if (turn := (done + k) % self.num_workers) in workers
            }
            self.worker_init_fn = _StartFrom(init, turns)
        try:
            return super().__iter__()
        finally:
            self.collate_fn, self.worker_init_fn, self.generator = collate, init, generator

    @property
    def _index_sampler(self) -> Any:
        sampler = super()._index_sampler
        return _SkipFirst(sampler, self._skip) if self._skip else sampler

    def state_dict(self) -> dict[str, Any]:
        seed = getattr(self.sampler, "seed", None)
        if self._pass is None:
            return {"pass": gather(None), "seed": seed}
        # Where the length is not known the trainer looks one batch ahead.
        ahead = len(getattr(self._peft_trainer.fit_loop._data_fetcher, "batches", ()))
        here = {**self._pass, "workers": dict(self._pass["workers"]), "given": max(0, self._pass["given"] - ahead)}
        return {"pass": gather({**here, "generators": _generator_states(self)}), "seed": seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = mine(state["pass"])
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.seed = state["seed"]  # Lightning takes it from seed_everything


class _SkipFirst:
    """A batch sampler without its first batches, the first time it is used."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self.sampler = sampler
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0  # persistent workers come back with it for the next epoch
        yield from itertools.islice(iter(self.sampler), skip, None)

    def __len__(self) -> int:
        return len(self.sampler)


class _WithStream:
    """Collates, and adds the worker's random streams as they stand after the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        return (batch, rng_state(cuda=False)) if get_worker_info() is not None else batch


class _StartFrom:
    """Initialises a worker, and then puts its random streams where they stood."""

    def __init__(self, init: Callable[[int], None] | None, states: dict[int, Any]) -> None:
        self.init = init
        self.states = states

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        if worker in self.states:
            set_rng_state(self.states[worker])


def _asked(iterator: Iterator[Any]) -> Iterator[Any]:
    """The same iterator, with its first item made already."""
    return itertools.chain(list(itertools.islice(iterator, 1)), iterator)


def _on_own_stream(batches: Iterator[Any]) -> Iterator[Any]:
    """Draw ``batches`` on random streams of their own, seeded from the current one."""
    import numpy as np

    seed = int(torch.empty((), dtype=torch.int64).random_())
    outside = rng_state(cuda=False)
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    own = rng_state(cuda=False)
    set_rng_state(outside)
    while True:
        outside = rng_state(cuda=False)
        set_rng_state(own)
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            own = rng_state(cuda=False)
            set_rng_state(outside)
        yield batch


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a user gave the loader or its samplers, each once."""
    holders = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    found = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    return list(found.values())


def _generator_states(loader: Any) -> list[torch.Tensor]:
    return [g.get_state() for g in _generators(loader)]


def _set_generators(loader: Any, states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators(loader), states):
        generator.set_state(state.cpu())


def _streams(loader: Any) -> dict[str, Any]:
    return {**rng_state(), "generators": _generator_states(loader)}


def _set_streams(loader: Any, state: dict[str, Any]) -> None:
    set_rng_state(state)
    _set_generators(loader, state["generators"])


def make_resumable(loader: Any, trainer: Any, restore: Callable[[Any], None]) -> Any:
    """Give a training loader the mixin, unless it can resume by itself (torchdata's ``StatefulDataLoader``).

    Args:
        loader: whatever the user trains on.
        trainer: the Trainer, for its progress.
        restore: called with the trainer before anything is drawn; puts the checkpoint's streams back, once.
    """
    if isinstance(loader, DataLoader) and not hasattr(loader, "state_dict"):
        add_mixin(loader, ResumableLoader)
    if isinstance(loader, ResumableLoader):
        loader._peft_trainer, loader._peft_restore = trainer, restore  # type: ignore[method-assign]
    return loader
