"""Train on a fixed part of the training data, and rank runs on a fixed part of the validation data."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_peft.pretrained import InputError

__all__ = ["keep_batches", "keep_fraction"]


def keep_fraction(data: L.LightningDataModule, fraction: float) -> None:
    """Make ``data`` train on a fixed random part of its examples; validation and test data do not change.

    The part depends only on the number of examples, so it is the same for every method and seed. A smaller part is
    contained in a larger one. Examples are drawn without regard to their labels.

    Args:
        data: changed in place.
        fraction: above 0 and at most 1; 1 changes nothing. At least one batch is kept, if there are enough examples.

    Raises:
        InputError: when the loader is created: if it has no length, or uses its own order of examples.
    """
    if fraction == 1:
        return
    make = data.train_dataloader

    def train_dataloader() -> DataLoader[Any]:
        return _part(make(), fraction)

    data.train_dataloader = train_dataloader  # type: ignore[method-assign]


def keep_batches(data: L.LightningDataModule, count: int) -> None:
    """Make ``data`` validate on a fixed random part of its examples, as many as ``count`` batches hold.

    The first batches would not do, because files are often sorted by label. Loaders that are not plain DataLoaders do
    not change.

    Args:
        data: changed in place.
    """
    make = data.val_dataloader

    def val_dataloader() -> Any:
        loader = make()
        if not _plain(loader) or len(loader) <= count:
            return loader
        return _subset(loader, count * loader.batch_size)

    data.val_dataloader = val_dataloader  # type: ignore[method-assign]


def _plain(loader: Any) -> bool:
    known = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return known and type(loader.sampler) in (RandomSampler, SequentialSampler) and loader.batch_size is not None


def _part(loader: Any, fraction: float) -> DataLoader[Any]:
    if not _plain(loader):
        raise InputError(
            f"fraction {fraction:g} of the training data: train_dataloader returns a {type(loader).__name__} that "
            "has no length or its own sampler. Return a DataLoader with shuffle=True or without a sampler"
        )
    return _subset(loader, max(round(fraction * len(loader.dataset)), loader.batch_size))


def _subset(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    size = len(loader.dataset)  # type: ignore[arg-type]
    kept = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: min(size, count)].tolist()
    return DataLoader(
        Subset(loader.dataset, kept),
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )
