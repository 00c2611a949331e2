"""Convert between local parts and full values of sharded tensors (DTensor); other tensors are returned unchanged."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

__all__ = ["gather_full", "holds_shards", "is_sharded", "local_part", "sharded_like"]


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


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor`` in the same way as ``like``; return it unchanged if ``like`` is not sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = cast(Any, like)
    return distribute_tensor(tensor.to(like.device), mesh.device_mesh, mesh.placements)
