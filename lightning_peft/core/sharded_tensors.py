"""Convert between local parts and full values of sharded tensors (DTensor); other tensors are returned unchanged."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["gather_elements", "gather_full", "holds_shards", "is_sharded", "local_part", "sharded_like"]


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def holds_shards(module: nn.Module) -> bool:
    """Whether this rank has only parts of the module's parameters: DTensors, or those of DeepSpeed ZeRO or FSDP."""
    return any(is_sharded(p) or hasattr(p, "ds_id") for p in module.parameters()) or any(
        type(m).__name__ == "FullyShardedDataParallel" for m in module.modules()
    )


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of ``tensor``; it shares memory with ``tensor``."""
    return cast(Tensor, getattr(tensor, "_local_tensor", tensor))


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank. All ranks must call this together."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def gather_elements(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return the elements at the flat ``positions`` of the full tensor, on every rank; all ranks must call it together.

    Only these elements are exchanged. The tensor itself stays sharded, unless it is sharded in an unusual way.
    """
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not tensor.ndim or any(type(placement) not in (Replicate, Shard) for placement in placements):
        return gather_full(tensor).detach().reshape(-1)[positions]
    local = local_part(tensor).detach()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    start, sizes = (torch.tensor(each, device=local.device)[:, None] for each in (offset, local.shape))
    here = torch.stack(torch.unravel_index(positions, tensor.shape)) - start
    owned = ((here >= 0) & (here < sizes)).all(0)
    found = local.new_zeros(len(positions))
    found[owned] = local[tuple(here[:, owned])]
    for i, placement in enumerate(placements):
        if placement.is_shard():  # every other rank adds zeros
            torch.distributed.all_reduce(found, group=mesh.get_group(i))
    return found


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor`` in the same way as ``like``; return it unchanged if ``like`` is not sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = cast(Any, like)
    return distribute_tensor(tensor.to(like.device), mesh.device_mesh, mesh.placements)
