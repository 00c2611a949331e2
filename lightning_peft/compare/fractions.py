"""Train on a fixed part of the training data."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_peft.pretrained import InputError

__all__ = ["keep_fraction"]


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


def _part(loader: Any, fraction: float) -> DataLoader[Any]:
    known = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not known or type(loader.sampler) not in (RandomSampler, SequentialSampler) or loader.batch_size is None:
        raise InputError(
            f"fraction {fraction:g} of the training data: train_dataloader returns a {type(loader).__name__} that "
            "has no length or its own sampler. Return a DataLoader with shuffle=True or without a sampler"
        )
    size = len(loader.dataset)
    count = min(size, max(round(fraction * size), loader.batch_size))
    kept = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].tolist()
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
