"""Checks that all ranks of a distributed run hold the same methods and adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_peft.core.names import canonical, listed
from lightning_peft.core.sharded_tensors import is_sharded
from lightning_peft.core.state.state_dict import owned_keys
from lightning_peft.core.targeting.base_modules import local_state_dict
from lightning_peft.trainer.audit import AuditError
from lightning_peft.trainer.quantised_strategies import packed_digests

__all__ = ["audit_methods", "audit_ranks"]


def audit_ranks(model: nn.Module) -> None:
    """Check that all ranks of a distributed run hold the same adapters; sharded tensors are skipped.

    Raises:
        AuditError: if a rank differs; the message names the tensors.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own, full = owned_keys(model), {canonical(k): v for k, v in local_state_dict(model).items()}
    state = {k: full[k] for k in own if not full[k].is_meta and not is_sharded(full[k])}
    digest = {k: (tuple(v.shape), float(v.double().sum()), float(v.double().norm())) for k, v in state.items()}
    for rank, keys in _differences(packed_digests(model)):
        raise AuditError(
            f"rank {rank} holds different quantised weights from rank 0: {listed(keys)}. Load the same base on "
            "every rank"
        )
    for rank, keys in _differences(digest):
        raise AuditError(
            f"rank {rank} holds different adapters from rank 0: {listed(keys)}. Apply the same methods with the same "
            "seed on every rank"
        )


def audit_methods(methods: Iterable[Any]) -> None:
    """Check that all ranks of a distributed run attach the same methods and initialise them from the same seed.

    If a module shards itself, no later step copies the adapters of one rank to another, so each would train its own.

    Raises:
        AuditError: if a rank differs; the message names the settings.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    said = {f"{type(m).__name__} {m.name!r}: {k}": v for m in methods for k, v in m.config().items()}
    said["seed_everything"] = os.environ.get("PL_GLOBAL_SEED")
    for rank, keys in _differences(said):
        raise AuditError(
            f"rank {rank} has different settings from rank 0: {listed(keys)}. Use the same settings on every rank"
        )


def _differences(mine: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, mine)
    for rank, other in enumerate(everywhere):
        keys = sorted(k for k in {**other, **everywhere[0]} if other.get(k) != everywhere[0].get(k))
        if keys:
            yield rank, keys
