"""``CacheFrozen``: compute the output of a model's frozen part once instead of in every epoch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import listed
from lightning_peft.core.state.digest import tensor_digests, value_digest
from lightning_peft.trainer.frozen_cache.first_batch import CannotCache, FirstBatch
from lightning_peft.trainer.frozen_cache.replay import Activations, Replay
from lightning_peft.trainer.frozen_cache.rows import BatchError, row_keys
from lightning_peft.trainer.frozen_cache.store import Store
from lightning_peft.trainer.resume.rng_state import rng_state, set_rng_state

__all__ = ["CacheFrozen"]


class CacheFrozen(L.Callback):
    """Compute the output of the model's frozen lower part once for each row of the data, then read it from disk.

    If nothing below a layer trains (a linear probe, the last layers, adapters in the last layers), the activations
    below it are the same in every epoch. The first training batch shows which calls of frozen modules end before
    anything that trains runs. From then on, the outputs of these calls are stored for each row, and a batch whose rows
    are all stored skips the calls. A row is recognised by its content, so batches may be shuffled. A row that is padded
    to a different length counts as a different row, so pad all texts to the same length.

    Training is the same as without this callback, up to rounding that depends on the other rows of a batch. In each
    epoch, the first batch that could skip the calls runs them anyway, and the results are compared.

    It works for training and validation, on one device and under DDP, where the ranks share the folder. Several runs
    can share a folder: stored rows are reused if weights, modes, precision, device and torch release are the same.

    Args:
        folder: where activations are stored, with one subfolder for each frozen part. Under DDP, an absolute path is
            safest.
        max_gb: the most that one fit may store, in units of 10^9 bytes; with None, only the disk limits it.
        exact: whether compared results must be equal bit for bit. If False, they may differ by rounding.

    Raises:
        ValueError: if ``max_gb`` is not positive.
        MisconfigurationException: at the start of a fit, or in its first step, if the output of the frozen part may
            change: active dropout, batch norm in training mode, data that change at random, a strategy that shards
            parameters, a compiled module. The message names the cause.

    Example::

        trainer = L.Trainer(callbacks=[lp.LinearProbe(), lp.CacheFrozen("cache")])
    """

    def __init__(self, folder: str | Path = "frozen_cache", max_gb: float | None = None, exact: bool = True) -> None:
        if max_gb is not None and not max_gb > 0:
            raise ValueError(f"max_gb must be positive or None, got {max_gb}")
        self.folder, self.max_gb, self.exact = Path(folder), max_gb, exact
        self._first: FirstBatch | None = None
        self._first_keys: list[str] = []
        self._replay: Replay | None = None
        self._trains: frozenset[int] = frozenset()
        self._versions: list[int] = []
        self._stores: dict[tuple[bool, ...], Store] = {}
        self._batch: tuple[Store, list[str], Activations | None] | None = None
        self._compared: set[str] = set()  # stages whose results were compared in this epoch
        self._hits = self._rows = self._expected_rows = 0
        self._plain_validation = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._plain_validation = False  # an earlier fit of this object may have had another module
        compiled = [name or "the module" for name, part in pl_module.named_modules() if _is_compiled(part)]
        if compiled:
            raise CannotCache(f"parts of compiled modules cannot be skipped: {listed(compiled)}")
        strategy = trainer.strategy
        if strategy.world_size > 1 and "DDP" not in type(strategy).__name__:
            raise CannotCache(f"{type(strategy).__name__} is not supported: use one device or DDP")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for loader in _loaders(trainer.train_dataloader):
            dataset = loader.dataset
            if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
                continue
            self._expected_rows = len(dataset)
            if _changes(dataset):
                raise CannotCache(
                    "the first entry of the training data differs each time it is read (random augmentation?), "
                    "but the data must be the same in every epoch"
                )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._replay is not None and _frozen_versions(pl_module) != self._versions:
            self._close()  # the frozen values have changed
        trainer.strategy.barrier("frozen cache")  # so that the rows of all ranks are there
        for store in self._stores.values():
            store.refresh()
        self._hits = self._rows = 0
        self._compared = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._replay is not None and _training(pl_module) != self._trains:
            self._close()  # a method has unfrozen more layers, so a smaller part of the model is the same in each epoch
        if self._replay is None:
            self._first_keys = _keys(batch)
            self._first = FirstBatch(pl_module, len(self._first_keys))
            self._first.__enter__()
        else:
            self._begin("train", trainer, pl_module, batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._look_at_first(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look_at_first(trainer, pl_module)
        self._end()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._replay is not None and not self._plain_validation:
            self._begin("validate", trainer, pl_module, batch)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        try:
            self._end()
        except CannotCache as error:
            self._plain_validation = True  # the batch was computed in full, so nothing is wrong
            rank_zero_info(f"CacheFrozen: validation runs in full, because {error.why}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for store in self._stores.values():
            store.flush()
        if trainer.current_epoch and self._rows and not self._hits:
            rank_zero_warn(
                f"CacheFrozen: none of the {self._rows} rows of this epoch had been seen before. Rows must be the same "
                "in every epoch: no random augmentation, and all texts padded to one length"
            )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave_first()
        self._close()

    def _look_at_first(self, trainer: Any, module: nn.Module) -> None:
        """Stop watching the first batch, and store its rows."""
        first = self._first
        if first is None:
            return
        self._leave_first()
        calls = first.skippable()
        self._replay = Replay(module, calls, first.counts)
        self._trains, self._versions = _training(module), _frozen_versions(module)
        found = Activations()
        for call in calls:
            if any(call.tensors[i][0]._version != call.tensors[i][1] for i in call.used):
                return  # an operation has changed it in place since, so these rows are stored in the next epoch
            found.add(call, [tensor for tensor, _ in call.tensors])
            call.tensors = []
        self._add(self._store(trainer, module), self._first_keys, found)

    def _leave_first(self) -> None:
        if self._first is not None:
            self._first.__exit__(None, None, None)
            self._first = None

    def _begin(self, stage: str, trainer: Any, module: nn.Module, batch: Any) -> None:
        assert self._replay is not None
        keys, store = _keys(batch), self._store(trainer, module)
        known = all(key in store for key in keys)
        self._rows += len(keys) * (stage == "train")
        self._hits += len(keys) * (stage == "train" and known)
        stored = store.read(keys) if known else None
        if stored is None or stage not in self._compared:
            if stored is not None:
                self._compared.add(stage)
            self._replay.record()
            self._batch = store, keys, stored
        else:
            self._replay.skip(stored, len(keys))

    def _end(self) -> None:
        batch, self._batch = self._batch, None
        found = None if self._replay is None else self._replay.end()
        if batch is None or found is None:
            return
        store, keys, stored = batch
        if stored is not None:
            self._compare(stored, found)
            return
        self._add(store, keys, found)

    def _add(self, store: Store, keys: list[str], found: Activations) -> None:
        empty = not len(store)
        store.add(keys, found)
        if empty:
            self._check_room(store)

    def _compare(self, stored: Activations, found: Activations) -> None:
        for old, new in zip(stored.tensors(), found.tensors()):
            new = new.cpu()
            if torch.equal(old, new):
                continue
            apart = float((old.double() - new.double()).abs().max())
            scale = float(new.abs().max())
            close = new.is_floating_point() and apart <= 16 * scale * torch.finfo(new.dtype).eps
            if close and not self.exact:
                continue
            advice = "the difference is rounding, which exact=False accepts" if close else "do not use CacheFrozen here"
            raise CannotCache(
                f"rows of this batch do not give the same activations as before (difference {apart:.3g}, values "
                f"up to {scale:.3g}), because they depend on the other rows of the batch: {advice}"
            )

    def _check_room(self, store: Store) -> None:
        """Print how much space the cache will take, once the size of a row is known."""
        needed, free = store.room(self._expected_rows)
        limit = math.inf if self.max_gb is None else self.max_gb * 1e9
        if needed > min(free, limit):
            what = f"max_gb={self.max_gb:g}" if limit < free else f"the {free / 1e9:.3g} GB that are free"
            raise CannotCache(
                f"it would store {needed / 1e9:.3g} GB for {self._expected_rows} rows in {store.folder}, more "
                f"than {what}"
            )
        rank_zero_info(
            f"CacheFrozen stores about {needed / 1e9:.3g} GB for {self._expected_rows} rows in {store.folder}"
        )

    def _store(self, trainer: Any, module: nn.Module) -> Store:
        """Return the store for the frozen part in its current modes; training and validation may have different
        ones."""
        replay = self._replay
        assert replay is not None
        modes = tuple(part.training for frozen in replay.modules.values() for part in frozen.modules())
        if modes not in self._stores:
            facts = [
                sorted(replay.modules),
                modes,
                [(call.module, call.index, repr(call.output), sorted(call.used)) for call in replay.calls],
                [original_class(part).__qualname__ for part in module.modules()],
                tensor_digests(dict(_frozen(module))),
                {name: list(stack.active) for name, stack in stacks(module).items()},
                str(trainer.precision),
                str(trainer.strategy.root_device.type),
                torch.__version__,
            ]
            folder = self.folder / value_digest(facts)
            self._stores[modes] = Store(folder, [sorted(call.used) for call in replay.calls])
        return self._stores[modes]

    def _close(self) -> None:
        if self._replay is not None:
            self._replay.close()
        for store in self._stores.values():
            store.flush()
        self._replay, self._stores, self._batch = None, {}, None


def _keys(batch: Any) -> list[str]:
    try:
        return row_keys(batch)
    except BatchError as error:
        raise CannotCache(f"the rows of a batch cannot be told apart: {error}") from error


def _training(module: nn.Module) -> frozenset[int]:
    return frozenset(id(p) for p in module.parameters() if p.requires_grad)


def _frozen(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in module.named_parameters() if not p.requires_grad)
    yield from module.named_buffers()


def _frozen_versions(module: nn.Module) -> list[int]:
    return [p._version for p in module.parameters() if not p.requires_grad]


def _changes(dataset: Any) -> bool:
    before = rng_state()
    try:
        return pickle.dumps(dataset[0]) != pickle.dumps(dataset[0])
    except (pickle.PicklingError, TypeError, AttributeError):
        return False  # not comparable; the warning about rows that are never seen again remains
    finally:
        set_rng_state(before)


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _loaders(value: Any) -> list[DataLoader]:
    if isinstance(value, DataLoader):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [loader for part in parts for loader in _loaders(part)]
