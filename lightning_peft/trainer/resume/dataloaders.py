"""Resume inside an epoch: training DataLoaders that continue at the batch after the checkpoint.

During a fit, the Trainer iterates a :class:`ResumableLoader` in place of each of the user's DataLoaders. The user's
loaders are read but never changed. Each pass iterates a copy of the loader and draws the same random numbers in the
same order as a pass over the loader itself. It records the RNG states before each draw that it makes in the main
process. A resumed pass repeats these draws to get the same order of indices, and skips the batches already seen
without loading them. Worker processes report their RNG states with each batch.

The batches of an ``IterableDataset`` have no indices, so they are drawn again and dropped. If such a dataset and the
training step both draw from the global RNGs in the main process, the record grows by up to 10 kB per batch.

torchdata's ``StatefulDataLoader`` resumes by itself and is used as it is. This module does not build on it, because
with the same seed its order differs from that of ``DataLoader``, and because it does not restore the RNG states of
workers, of iterable datasets, or of samplers other than ``RandomSampler``.

A loader class that overrides the iteration resumes only if it has ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_peft.trainer.resume.loader_source import LoaderSource, RecordedOrder
from lightning_peft.trainer.resume.rng_recording import RecordedDraws
from lightning_peft.trainer.resume.rng_state import SavedRNGState

__all__ = ["ResumableLoader", "TrainingLoaders"]


class TrainingLoaders:
    """Makes the training loaders of one Trainer resumable for a fit, and puts the user's loaders back after it.

    Attributes:
        saved: The RNG states of the checkpoint that the run resumes from.
    """

    def __init__(self) -> None:
        self.saved = SavedRNGState()
        self._released: list[Any] = []

    def wrap(self, loader: Any, trainer: Any) -> Any:
        """Return a :class:`ResumableLoader` for a DataLoader; return any other loader itself.

        A warning tells the user if the loader cannot resume exactly.
        """
        if type(loader) is ResumableLoader:  # Lightning processes the loaders of a CombinedLoader twice
            loader = loader._peft.loader
        self._released = []
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return loader
        kind = type(loader)
        if not isinstance(loader, DataLoader) or not (
            kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator
        ):
            rank_zero_warn(
                f"a run that stops and resumes will not see the same batches: {kind.__name__} overrides the iteration "
                "of DataLoader, so its position and random numbers cannot be saved. Implement state_dict() and "
                "load_state_dict(), or resume from checkpoints at the end of an epoch if the order does not matter"
            )
            return loader
        if loader.num_workers and not getattr(loader, "in_order", True):
            rank_zero_warn(
                "a run that stops and resumes will not see the same batches: with in_order=False, batches arrive in "
                "the order in which workers finish them, which is not saved. Use DataLoader(in_order=True)"
            )
        for sampler in (loader.sampler, loader.batch_sampler):
            for name, value in getattr(sampler, "__dict__", {}).items():
                if hasattr(value, "__next__"):
                    rank_zero_warn(
                        f"a run that stops and resumes will not see the same batches: {type(sampler).__name__}.{name} "
                        "is an iterator, and its position cannot be saved. Create it in the sampler's __iter__"
                    )
        return ResumableLoader(loader, trainer, self.saved)

    def release(self, trainer: Any) -> None:
        """Put the user's loaders back into the Trainer; :meth:`save_released` can still save their state."""
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
        """Add the loaders' state to a checkpoint that is saved after :meth:`release`, when Lightning finds none."""
        if self._released and "loops" in checkpoint:
            states = [loader.state_dict() for loader in self._released if hasattr(loader, "state_dict")]
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states


class ResumableLoader:
    """Replaces a training DataLoader during a fit: it has the same attributes and can resume inside an epoch."""

    def __init__(self, loader: DataLoader, trainer: Any, saved: SavedRNGState) -> None:
        # Not through __setattr__, which writes to the user's loader.
        vars(self).update(_peft=LoaderSource(loader, trainer, saved), _iterator=None)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._peft.loader)  # users' hooks check isinstance(trainer.train_dataloader, DataLoader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peft.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value  # Lightning sets _iterator to None to shut workers down
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


class _Pass:
    """One pass over the loader behind a :class:`ResumableLoader`."""

    record: dict[str, Any]

    def __init__(self, proxy: Any) -> None:
        self.proxy = proxy
        self.source: LoaderSource = proxy._peft
        self.batches: Iterator[Any] | None = None
        self.order: RecordedOrder | None = None
        # After a checkpoint is loaded, a pass starts only when the first batch is requested. By then the Trainer has
        # restored its progress, and the RNG states of the checkpoint can be set first.
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
            return None  # Lightning fetches this batch and discards it
        if self.late:
            self.source.saved.restore(self.source.trainer)
            self._start_late(ours)
        if self in ours:  # a user's hook may iterate trainer.train_dataloader too, and must not advance the record
            self.source.record = self.record
        return self._draw()

    def _start_late(self, ours: list[_Pass]) -> None:
        # All passes of the Trainer start together, as they did in the run that saved the checkpoint: they draw from
        # the same global RNGs, in the order of the loaders.
        late = [each for each in ours if each.late] if self in ours else [self]
        if self in ours:
            # The uninterrupted run fetched a batch of its first, discarded pass too; its draws must be repeated.
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
            # two rounds of workers cover the batches that are fetched ahead
            record["reported"].pop(given - 2 * workers - 1, None)
        record["given"] += 1
        if self.order is not None:
            record["asked"] = self.order.asks.count
        return batch

    def start(self, resumed: dict[str, Any] | None) -> None:
        """Begin the pass, or continue the pass that the checkpoint's record ``resumed`` describes."""
        source, loader, rng_states = self.source, self.source.loader, self.source.rng_states
        self.late = False
        if resumed is not None:
            source.resumed = None
            rng_states.set({"generators": resumed["generators"]})
            if not source.in_the_middle():  # a new epoch: only persistent workers continue from the record
                if loader.persistent_workers:
                    before = resumed.get("workers")  # earlier versions wrote the states under this key
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
        # Persistent workers are seeded once, and their RNG states continue from pass to pass.
        loader, lasting = (
            self.source.loader,
            self.source.persistent_workers if self.source.loader.persistent_workers else {},
        )
        first = not lasting and self.proxy._iterator is None and loader._iterator is None
        return {"start": now, "given": 0, "first": first, "lasting": lasting}

    def _skip(self, done: int) -> tuple[int, dict[int, Any]]:
        """How many of the ``done`` batches can be skipped without loading, and the workers' RNG states after those.

        Worker k loads batches k, k + count, ..., so that only whole rounds can be skipped: the first batch after a
        resume always comes from worker 0.
        """
        source, count = self.source, self.source.loader.num_workers
        if not source.indexed:
            return 0, {}
        skip = done - done % count if count else done
        workers = source.worker_rng_states(self.record, skip)
        return (skip, workers) if len(workers) == count else (0, dict(self.record["lasting"]))

    def _open(self, skip: int, workers: dict[int, Any], drawn: int, now: dict[str, Any] | None) -> None:
        """Open the iterator that batches come from.

        Args:
            skip: The number of batches to skip by index.
            workers: Worker number -> the RNG states it starts from.
            drawn: The number of batches that the saved run had drawn, including those fetched ahead.
            now: The current RNG states of a resumed pass, to put back afterwards; None for a new pass.
        """
        source, rng_states, record = self.source, self.source.rng_states, self.record
        running = self.proxy._iterator
        if source.indexed:
            order = source.order if running is not None else None
            self.order = source.order = order or RecordedOrder(source)
            # Workers get their indices several batches ahead, so all that were drawn must be repeated. Without
            # workers, an index is drawn together with its batch.
            self.order.set(record["asks"], record.get("asked", skip) if source.loader.num_workers else skip, skip)
        twin = source.open(running, self.order, record["first"], workers)
        # iter() draws the workers' base seed, so a resumed pass draws it with the states before the saved pass.
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
    """The passes that the Trainer itself iterates, as opposed to those that users' hooks start."""
    combined = trainer.fit_loop._combined_loader
    iterator = combined._iterator if combined is not None else None
    return [each for each in getattr(iterator, "iterators", ()) if isinstance(each, _Pass)]


def _same_loader(loader: Any) -> Any:
    return loader
