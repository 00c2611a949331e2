"""Convert between local parts and full values of sharded tensors (DTensor); other tensors are returned unchanged.

FSDP1 does not use DTensors: its parameters hold a range of the flattened tensor, which :class:`FlatPart` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = [
    "FlatPart",
    "distribute_like",
    "distributed_like",
    "flat_part",
    "full_shape",
    "gather_elements",
    "gather_full",
    "is_sharded",
    "local_part",
    "on_full_values",
    "sharded_like",
    "with_whole_blocks",
]


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "_local_tensor")


@dataclass(frozen=True)
class FlatPart:
    """The part of a parameter that FSDP1 leaves on this rank.

    Attributes:
        shape: the shape of the whole parameter.
        start: where the part starts in the flattened parameter; parts can be empty.
        group: the process group that holds the parameter together.
    """

    shape: torch.Size
    start: int
    group: Any


def flat_part(tensor: Any) -> FlatPart | None:
    """Return the part of a parameter that FSDP1 keeps on this rank; None for a parameter that FSDP1 does not shard."""
    return getattr(tensor, "_peft_flat_part", None)


def full_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor."""
    part = flat_part(tensor)
    return tensor.shape if part is None else part.shape


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
    if (part := flat_part(tensor)) is not None:
        here = positions.to(tensor.device) - part.start
        owned = (here >= 0) & (here < tensor.numel())
        found = tensor.detach().new_zeros(len(positions))
        found[owned] = tensor.detach()[here[owned]]
        torch.distributed.all_reduce(found, group=part.group)  # every other rank adds zeros
        return found
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


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor``, which is equal on all ranks, as a DTensor that is replicated on the mesh of ``like``.

    Return it unchanged if it is a DTensor already, or ``like`` is not. In backward, its gradient is summed over the
    ranks of the mesh where each has only a part.
    """
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, like).device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


@contextmanager
def distributed_like(like: Tensor, module: nn.Module) -> Iterator[None]:
    """Inside the context, the parameters and buffers of ``module`` are distributed by :func:`distribute_like`."""
    if not is_sharded(like):
        yield
        return
    tensors: list[dict[str, Any]] = [each for m in module.modules() for each in (m._parameters, m._buffers)]
    before = [dict(each) for each in tensors]
    for each in tensors:
        each.update((name, distribute_like(value, like)) for name, value in each.items() if value is not None)
    try:
        yield
    finally:
        for each, values in zip(tensors, before):
            each.update(values)


def on_full_values(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return ``function(tensor)``; a DTensor is gathered before, and the result is distributed like it.

    For operations that DTensors lack. ``function`` must return equal values on all ranks.
    """
    return distribute_like(function(gather_full(tensor)), tensor)


def with_whole_blocks(tensor: Tensor, blocks: int, dim: int = -1) -> Tensor:
    """Reshard ``tensor`` so that no shard splits one of ``blocks`` equal parts of the dimension ``dim``."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    whole = [
        Replicate() if placement.is_shard(dim % tensor.ndim) and blocks % mesh.size(i) else placement
        for i, placement in enumerate(placements)
    ]
    return cast(Tensor, cast(Any, tensor).redistribute(placements=whole))
