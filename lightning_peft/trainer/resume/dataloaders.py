"""Resume inside an epoch: training DataLoaders that continue at the batch after the checkpoint.

During a fit, a :class:`ResumableLoader` stands in the Trainer's list for each of the user's DataLoaders, which are only
read. Every pass iterates a copy of the loader, and draws what a pass over the loader itself draws, in the same order.
A pass records the random RNG states from before each draw that it makes in the main process, so that a resumed pass can
repeat them: the same order is drawn again, and the batches already seen are skipped by index, without loading them.
Worker processes report their RNG states with each batch.

An ``IterableDataset`` has no indices: its batches are drawn again and dropped. If it draws from the global random
RNG states in the main process, and training does too, the record grows by up to 10 kB a batch.

torchdata's ``StatefulDataLoader`` resumes by itself and is left alone. It is not what this module builds on, because at
one seed its order is not that of ``DataLoader``, and because it does not restore the random RNG states of workers, of
iterable datasets, and of samplers other than ``RandomSampler``.

Not covered: a checkpoint after the last batch of a pass whose length is not known, and before its validation, which
Lightning then leaves out; loaders with an iteration of their own, unless they have ``state_dict`` and
``load_state_dict``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_peft.trainer.resume.rng_recording import CollateWithRNGState, RecordedDraws, RNGStates, StartWorker
from lightning_peft.trainer.resume.rng_state import SavedRNGState, gather_ranks, this_rank

__all__ = ["ResumableLoader", "TrainingLoaders"]


class TrainingLoaders:
    """The training loaders of one Trainer: made resumable for a fit, and given back after it.

    Attributes:
        saved: the random RNG states of the checkpoint that the run resumes from.
    """

    def __init__(self) -> None:
        self.saved = SavedRNGState()
        self._released: list[Any] = []

    def wrap(self, loader: Any, trainer: Any) -> Any:
        """A resumable stand-in for a DataLoader; any other loader itself, with a warning if it cannot resume."""
        if type(loader) is ResumableLoader:  # the user's CombinedLoader, processed again
            loader = loader._peft.loader
        self._released = []
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return loader
        kind = type(loader)
        if not isinstance(loader, DataLoader) or not (
            kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator
        ):
            rank_zero_warn(
                f"a run that stops and resumes will not see the same batches: {kind.__name__} has an iteration of its "
                "own, whose position and random numbers cannot be stored. Give it state_dict() and load_state_dict(), "
                "or resume from checkpoints of an epoch's end if its order does not matter"
            )
            return loader
        if loader.num_workers and not getattr(loader, "in_order", True):
            rank_zero_warn(
                "a run that stops and resumes will not see the same batches: with in_order=False batches come as "
                "workers finish them, and which of them came is not stored. Use DataLoader(in_order=True)"
            )
        for sampler in (loader.sampler, loader.batch_sampler):
            for name, value in getattr(sampler, "__dict__", {}).items():
                if hasattr(value, "__next__"):
                    rank_zero_warn(
                        f"a run that stops and resumes will not see the same batches: {type(sampler).__name__}.{name} "
                        "is an iterator, whose position cannot be stored. Create it in __iter__ of the sampler"
                    )
        return ResumableLoader(loader, trainer, self.saved)

    def release(self, trainer: Any) -> None:
        """Put the user's loaders back into the Trainer's list; their state can still be saved."""
        combined = trainer.fit_loop._combined_loader
        if combined is None or not any(type(loader) is ResumableLoader for loader in combined.flattened):
            return
        self._released = combined.flattened
        for loader in self._released:
            if type(loader) is ResumableLoader:
                loader._peft.close()
                loader._iterator = None
        combined.flattened = [x._peft.loader if type(x) is ResumableLoader else x for x in self._released]

    def save_released(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the loaders to a checkpoint that is saved after the fit."""
        if self._released and "loops" in checkpoint:
            states = [loader.state_dict() for loader in self._released if hasattr(loader, "state_dict")]
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states


class ResumableLoader:
    """Stands for a training DataLoader during a fit: has all its attributes, and can resume inside an epoch."""

    def __init__(self, loader: DataLoader, trainer: Any, saved: SavedRNGState) -> None:
        vars(self).update(_peft=_Source(loader, trainer, saved), _iterator=None)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._peft.loader)  # hooks ask isinstance(trainer.train_dataloader, DataLoader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peft.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value  # Lightning resets _iterator
        else:
            setattr(self._peft.loader, name, value)

    def __len__(self) -> int:
        return len(self._peft.loader)

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self)

    def __reduce__(self) -> Any:
        return _same_loader, (self._peft.loader,)

    def state_dict(self) -> dict[str, Any]:
        return self._peft.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._peft.load_state_dict(state)


class _Source:
    """The user's loader behind a :class:`ResumableLoader`, and the record of the Trainer's pass over it."""

    def __init__(self, loader: DataLoader, trainer: Any, saved: SavedRNGState) -> None:
        self.loader = loader
        self.trainer = trainer
        self.saved = saved
        self.rng_states = RNGStates(loader, loader.sampler, loader.batch_sampler, loader.dataset)
        self.indexed = not isinstance(loader.dataset, IterableDataset)
        self.record: dict[str, Any] | None = None  # of the Trainer's pass under way, or of the last one
        self.resumed: dict[str, Any] | None = None  # of the checkpoint, until a pass continues from it
        self.persistent_workers: dict[int, Any] = {}  # the RNG states of persistent workers after their latest batches
        self.order: _Order | None = None  # of the latest pass: persistent workers keep it
        self._ahead: int | None = None

    @property
    def index_sampler(self) -> Any:
        return self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler

    @property
    def ahead(self) -> int:
        """The number of batches that the Trainer has drawn but not trained on: 1 if the length is not known."""
        batches = getattr(self.trainer.fit_loop._data_fetcher, "batches", ())
        return len(batches) if self._ahead is None else self._ahead

    def close(self) -> None:
        """The fit is over: keep the record alone."""
        self._ahead = self.ahead
        self.order = None

    def looks_ahead(self, index: int) -> bool:
        fetcher = self.trainer.fit_loop._data_fetcher
        return fetcher is not None and fetcher.length is None

    def draws_at(self, index: int) -> bool:
        """Whether the sampler may draw when it is asked for the batch at ``index``; torch's draw for the first."""
        return index == 0 or self.rng_states.has_own or not type(self.loader.sampler).__module__.startswith("torch.")

    def starts_once_more(self) -> bool:
        """Whether Lightning leaves out the second start of a pass over reloaded data, because it resumes."""
        resuming = getattr(self.trainer.fit_loop, "is_resuming", False)
        return resuming and self.trainer.current_epoch > 0 and not self.in_the_middle()

    def starts_twice(self) -> bool:
        """Whether Lightning drops this pass, the first of a run that resumes; releases before 2.5.3 may."""
        fit = self.trainer.fit_loop
        first = fit._data_fetcher is not None and fit._data_fetcher.iterator is None
        done = fit.epoch_progress.current.processed  # trainer.current_epoch is not restored yet
        return first and done > 0 and not fit.epoch_loop.restarting and not hasattr(fit, "is_resuming")

    def in_the_middle(self) -> bool:
        epoch = self.trainer.fit_loop.epoch_loop
        return epoch.batch_progress.current.ready > 0 and not epoch._num_ready_batches_reached()

    def state_dict(self) -> dict[str, Any]:
        record = self.resumed
        if self.record is not None:
            given = max(0, self.record["given"] - self.ahead)
            copies = {k: dict(v) if isinstance(v, dict) else v for k, v in self.record.items()}
            own = self.rng_states.state()["generators"]
            record = {**copies, "given": given, "drawn": self.record["given"], "generators": own}
        return {"pass": gather_ranks(record), "seed": getattr(self.loader.sampler, "seed", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resumed = this_rank(state["pass"])
        if isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.seed = state["seed"]  # Lightning takes it from seed_everything

    def worker_rng_states(self, record: dict[str, Any], given: int) -> dict[int, Any]:
        """The RNG states of the workers, by number, after the first ``given`` batches of a pass."""
        reported, workers = record["reported"], self.loader.num_workers
        return {**record["lasting"], **{i % workers: reported[i] for i in sorted(reported) if i < given}}

    def open(self, iterator: Any, order: _Order | None, first: bool, workers: dict[int, Any]) -> Any:
        """A copy of the loader as it is now, to be iterated.

        Args:
            iterator: that of persistent workers, if they run.
            order: its batches, as indices.
            first: draw a seed for the workers.
            workers: random RNG states that workers start from.
        """
        twin: Any = object.__new__(type(self.loader))
        mine: dict[str, Any] = vars(twin)
        mine.update(vars(self.loader), _iterator=iterator)
        if not first:
            mine["generator"] = torch.Generator()
        if self.loader.num_workers:
            mine["worker_init_fn"] = StartWorker(self.loader.worker_init_fn, workers)
            if self.indexed:
                mine["collate_fn"] = CollateWithRNGState(self.loader.collate_fn)
        if order is not None:
            mine["sampler" if self.loader.batch_sampler is None else "batch_sampler"] = order
        return twin


class _Pass:
    """One pass over the loader behind a :class:`ResumableLoader`."""

    record: dict[str, Any]

    def __init__(self, proxy: Any) -> None:
        self.proxy = proxy
        self.source: _Source = proxy._peft
        self.batches: Iterator[Any] | None = None
        self.order: _Order | None = None
        # After a checkpoint was loaded, a pass starts when it is asked for a batch: by then the Trainer has restored
        # its progress, and the RNG states are those of the checkpoint.
        self.late = self.source.saved.waiting or self.source.resumed is not None
        self.dropped = self.late and self.source.starts_twice()
        if not self.late:
            self.start(None)
            self.late = self.source.starts_once_more()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        ours = _passes(self.source.trainer)
        if self.dropped:
            return None  # fetched ahead, and not looked at
        if self.late:
            self.source.saved.restore(self.source.trainer)
            self._start_late(ours)
        if self in ours:
            self.source.record = self.record
        return self._draw()

    def _start_late(self, ours: list[_Pass]) -> None:
        late = [each for each in ours if each.late] if self in ours else [self]
        if self in ours:  # and is not the pass of a hook that walks trainer.train_dataloader
            for each in late:
                if each.batches is not None and each.source.looks_ahead(0):
                    next(each.batches, None)
        for each in late:
            each.start(each.source.resumed if self in ours else None)

    def _draw(self) -> Any:
        assert self.batches is not None
        record, given, workers = self.record, self.record["given"], self.source.loader.num_workers
        batch = next(self.batches)
        if self.source.indexed and workers:
            batch, rng_states = batch
            record["reported"][given] = self.source.persistent_workers[given % workers] = rng_states
            record["reported"].pop(given - 2 * workers - 1, None)
        record["given"] += 1
        if self.order is not None:
            record["asked"] = self.order.asks.count
        return batch

    def start(self, resumed: dict[str, Any] | None) -> None:
        """Begin the pass, or continue the one of a checkpoint."""
        source, loader, rng_states = self.source, self.source.loader, self.source.rng_states
        self.late = False
        if resumed is not None:
            source.resumed = None
            rng_states.set({"generators": resumed["generators"]})
            if not source.in_the_middle():
                if loader.persistent_workers:
                    before = resumed.get("workers")  # written by earlier versions
                    source.persistent_workers = (
                        source.worker_rng_states(resumed, resumed["given"]) if before is None else before
                    )
                resumed = None
        now = rng_states.state()
        self.record = {**(resumed or self._new_record(now))}
        for log in ("asks", "draws", "reported", "lasting"):
            self.record[log] = dict(self.record.get(log, ()))
        done = self.record["given"]
        skip, workers = self._skip(done)
        self.record["given"] = skip
        self._open(skip, workers, self.record.pop("drawn", done), now if resumed else None)
        for _ in range(done - skip):
            self._draw()

    def _new_record(self, now: dict[str, Any]) -> dict[str, Any]:
        # Persistent workers draw one seed in their life, and their RNG states continue from pass to pass.
        loader, lasting = (
            self.source.loader,
            self.source.persistent_workers if self.source.loader.persistent_workers else {},
        )
        first = not lasting and self.proxy._iterator is None and loader._iterator is None
        return {"start": now, "given": 0, "first": first, "lasting": lasting}

    def _skip(self, done: int) -> tuple[int, dict[int, Any]]:
        """How many of ``done`` batches need not be drawn again, and the RNG states that workers then start from."""
        source, count = self.source, self.source.loader.num_workers
        if not source.indexed:
            return 0, {}
        skip = done - done % count if count else done  # worker k has the turns k, k + count, ...
        workers = source.worker_rng_states(self.record, skip)
        return (skip, workers) if len(workers) == count else (0, dict(self.record["lasting"]))

    def _open(self, skip: int, workers: dict[int, Any], drawn: int, now: dict[str, Any] | None) -> None:
        source, rng_states, record = self.source, self.source.rng_states, self.record
        running = self.proxy._iterator
        if source.indexed:
            order = source.order if running is not None else None
            self.order = source.order = order or _Order(source)
            # Workers are given indices early. In this process, an index is drawn with its batch, and repeated with it.
            self.order.set(record["asks"], record.get("asked", skip) if source.loader.num_workers else skip, skip)
        twin = source.open(running, self.order, record["first"], workers)
        if now is not None:
            rng_states.set(record["start"])
        batches = iter(twin)
        self.proxy._iterator = twin._iterator
        if now is not None:
            if self.order is not None and self.order.asks.left is None:
                self.order.asks.left = rng_states.state()
            rng_states.set(now)
        if not source.loader.num_workers:
            ahead = source.looks_ahead if source.indexed else None
            batches = RecordedDraws(
                batches, rng_states, record["draws"], drawn, count=skip, when=ahead, window=source.indexed
            )
        self.batches = batches


def _passes(trainer: Any) -> list[_Pass]:
    """The passes that the Trainer's own iteration holds."""
    combined = trainer.fit_loop._combined_loader
    iterator = combined._iterator if combined is not None else None
    return [each for each in getattr(iterator, "iterators", ()) if isinstance(each, _Pass)]


def _same_loader(loader: Any) -> Any:
    return loader


class _Order:
    """The index sampler of a loader, whose draws are recorded; a resumed pass begins after the first batches."""

    asks: RecordedDraws

    def __init__(self, source: _Source) -> None:
        self.source = source

    def set(self, log: dict[int, dict[str, Any]], until: int, skip: int) -> None:
        """Prepare a pass: see :class:`Recorded`; ``skip`` batches are left out."""
        self.log, self.until, self.skip = log, until, skip

    def __iter__(self) -> Iterator[Any]:
        items, rng_states = iter(self.source.index_sampler), self.source.rng_states
        self.asks = RecordedDraws(items, rng_states, self.log, self.until, when=self.source.draws_at)
        return itertools.islice(self.asks, self.skip, None)

    def __len__(self) -> int:
        return len(self.source.index_sampler)
