"""The user's DataLoader behind a resumable one: its samplers, its workers, and the record of a pass over it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_peft.trainer.resume.epoch_end import saved_before_epoch_end
from lightning_peft.trainer.resume.rng_recording import CollateWithRNGState, RecordedDraws, RNGStates, StartWorker
from lightning_peft.trainer.resume.rng_state import SavedRNGState, gather_ranks, this_rank

__all__ = ["LoaderSource", "RecordedOrder"]


class LoaderSource:
    """The user's loader behind a resumable one, and the record of the Trainer's current pass over it.

    The record is a dictionary, because it goes into checkpoints as it is: ``start`` (RNG states before the pass),
    ``given`` (batches returned), ``first`` (the pass draws a seed for workers), ``lasting`` (states of persistent
    workers before the pass), ``asks`` and ``draws`` (RNG states before each index and each batch), ``asked`` (indices
    drawn) and ``reported`` (states that workers sent with their batches).
    """

    def __init__(self, loader: DataLoader, trainer: Any, saved: SavedRNGState) -> None:
        self.loader = loader
        self.trainer = trainer
        self.saved = saved
        self.rng_states = RNGStates(loader, loader.sampler, loader.batch_sampler, loader.dataset)
        self.indexed = not isinstance(loader.dataset, IterableDataset)
        self.record: dict[str, Any] | None = None  # the record of the Trainer's current or latest pass
        self.resumed: dict[str, Any] | None = None  # the checkpoint's record, until a pass continues from it
        self.persistent_workers: dict[int, Any] = {}  # RNG states of persistent workers after their latest batches
        self.order: RecordedOrder | None = None  # kept from pass to pass, because persistent workers keep their sampler
        self._ahead: int | None = None

    @property
    def index_sampler(self) -> Any:
        return self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler

    @property
    def ahead(self) -> int:
        """The number of batches that the Trainer has fetched but not trained on; it fetches one ahead if the loader
        has no length."""
        batches = getattr(self.trainer.fit_loop._data_fetcher, "batches", ())
        return len(batches) if self._ahead is None else self._ahead

    def close(self) -> None:
        """Free everything but the record at the end of a fit."""
        self._ahead = self.ahead
        self.order = None

    def looks_ahead(self, index: int) -> bool:
        """Whether Lightning fetches the next batch before it trains on this one, as it does without a length."""
        fetcher = self.trainer.fit_loop._data_fetcher
        return fetcher is not None and fetcher.length is None

    def draws_at(self, index: int) -> bool:
        """Whether the sampler may draw random numbers for the batch at ``index``; torch's own do for the first only."""
        return index == 0 or self.rng_states.has_own or not type(self.loader.sampler).__module__.startswith("torch.")

    def starts_once_more(self) -> bool:
        """Whether Lightning starts this pass only once because it resumes.

        An uninterrupted run starts a pass over reloaded data twice, and draws random numbers each time. The resumed run
        must draw as often.
        """
        resuming = getattr(self.trainer.fit_loop, "is_resuming", False)
        return resuming and self.trainer.current_epoch > 0 and not self.in_the_middle()

    def starts_twice(self) -> bool:
        """Whether this first pass of a resumed run is discarded, by finish_epoch or by Lightning before 2.5.3."""
        fit = self.trainer.fit_loop
        first = fit._data_fetcher is not None and fit._data_fetcher.iterator is None
        if first and saved_before_epoch_end(self.trainer):
            return True
        done = fit.epoch_progress.current.processed  # trainer.current_epoch is restored later
        return first and done > 0 and not fit.epoch_loop.restarting and not hasattr(fit, "is_resuming")

    def in_the_middle(self) -> bool:
        """Whether the Trainer's progress is inside an epoch."""
        epoch = self.trainer.fit_loop.epoch_loop
        return epoch.batch_progress.current.ready > 0 and not epoch._num_ready_batches_reached()

    def state_dict(self) -> dict[str, Any]:
        record = self.resumed
        if self.record is not None:
            # Batches that were fetched ahead were never trained on, so the resumed run must train on them.
            given = max(0, self.record["given"] - self.ahead)
            copies = {k: dict(v) if isinstance(v, dict) else v for k, v in self.record.items()}
            own = self.rng_states.state()["generators"]
            record = {**copies, "given": given, "drawn": self.record["given"], "generators": own}
        return {"pass": gather_ranks(record), "seed": getattr(self.loader.sampler, "seed", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resumed = this_rank(state["pass"])
        if isinstance(self.loader.sampler, DistributedSampler):
            # Lightning sets this seed from seed_everything, which the resumed run may call with another value.
            self.loader.sampler.seed = state["seed"]

    def worker_rng_states(self, record: dict[str, Any], given: int) -> dict[int, Any]:
        """The workers' RNG states after the first ``given`` batches of a pass, by worker number."""
        reported, workers = record["reported"], self.loader.num_workers
        return {**record["lasting"], **{i % workers: reported[i] for i in sorted(reported) if i < given}}

    def open(self, iterator: Any, order: RecordedOrder | None, first: bool, workers: dict[int, Any]) -> Any:
        """Return a copy of the loader in its present state, to be iterated.

        Args:
            iterator: The iterator of running persistent workers, or None.
            order: Replaces the sampler, so that draws are recorded and batches can be skipped.
            first: Whether the pass draws a seed for the workers from the loader's generator.
            workers: Worker number -> the RNG states it starts from.
        """
        # DataLoader forbids setting samplers after __init__, and a subclass's __init__ may take any arguments.
        twin: Any = object.__new__(type(self.loader))
        mine: dict[str, Any] = vars(twin)
        mine.update(vars(self.loader), _iterator=iterator)
        if not first:  # torch would draw a seed once more: let it draw from a generator that nothing else uses
            mine["generator"] = torch.Generator()
        if self.loader.num_workers:
            mine["worker_init_fn"] = StartWorker(self.loader.worker_init_fn, workers)
            if self.indexed:
                mine["collate_fn"] = CollateWithRNGState(self.loader.collate_fn)
        if order is not None:
            mine["sampler" if self.loader.batch_sampler is None else "batch_sampler"] = order
        return twin


class RecordedOrder:
    """Wraps the loader's index sampler: records its draws, and leaves out the first batches of a resumed pass."""

    asks: RecordedDraws

    def __init__(self, source: LoaderSource) -> None:
        self.source = source

    def set(self, log: dict[int, dict[str, Any]], until: int, skip: int) -> None:
        """Prepare the next pass: ``log`` and ``until`` as in :class:`RecordedDraws`; ``skip`` batches are left out."""
        self.log, self.until, self.skip = log, until, skip

    def __iter__(self) -> Iterator[Any]:
        items, rng_states = iter(self.source.index_sampler), self.source.rng_states
        self.asks = RecordedDraws(items, rng_states, self.log, self.until, when=self.source.draws_at)
        return itertools.islice(self.asks, self.skip, None)

    def __len__(self) -> int:
        return len(self.source.index_sampler)
