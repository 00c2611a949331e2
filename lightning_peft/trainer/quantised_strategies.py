"""Quantised bases under strategies of several processes: DDP leaves them alone, sharding is refused."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import join
from lightning_peft.core.record import preparations
from lightning_peft.core.sharded_tensors import is_sharded
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.packed import is_packed, own_tensors, plain_tensors
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["adapt_quantised", "packed_digests"]


def adapt_quantised(module: nn.Module, strategy: Any) -> None:
    """Keep the quantised tensors of ``module`` out of DDP, which cannot copy tensor subclasses to the other ranks.

    ``audit_ranks`` compares them instead.

    Raises:
        MisconfigurationException: if a strategy shards them, or quantises in processes whose weights it copies back.
    """
    spawning = lightning_classes("strategies.launchers.multiprocessing._MultiProcessingLauncher")
    if preparations(module) and isinstance(getattr(strategy, "launcher", None), spawning):
        raise MisconfigurationException(
            "QuantizeBase is not supported with a strategy that spawns or forks: after fit, Lightning loads the "
            "quantised weights of the other processes into the float base of this one. Use strategy='ddp'"
        )
    packed = {name: m for name, m in base_modules(module) if is_packed(m)}
    sharded = [n for n, m in packed.items() if any(is_sharded(t) for _, t in own_tensors(m))]
    if packed and (sharded or isinstance(strategy, lightning_classes("strategies.FSDPStrategy"))):
        name = (sharded or [*packed])[0]
        raise MisconfigurationException(
            f"{name!r} ({original_class(packed[name]).__name__}) has a quantised weight, which "
            f"{type(strategy).__name__} cannot shard: its scales are not parameters, or would be split differently. "
            "Use strategy='ddp', or shard other modules only"
        )
    if packed and isinstance(strategy, lightning_classes("strategies.DDPStrategy")):
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        frozen = {join(n, k) for n, m in packed.items() for k, t in own_tensors(m) if not t.requires_grad}
        vars(module)["_ddp_params_and_buffers_to_ignore"] = sorted({*ignored, *frozen})


def packed_digests(model: nn.Module) -> dict[str, tuple]:
    """Sizes and sums of the stored bytes of all quantised tensors, by name."""
    digests: dict[str, tuple] = {}
    for name, module in base_modules(model):
        for key, tensor in own_tensors(module) if is_packed(module) else ():
            for part, stored in plain_tensors(join(name, key), tensor):
                if not stored.is_meta:
                    octets = stored.detach().contiguous().view(-1).view(torch.uint8)
                    digests[part] = tuple(stored.shape), int(octets.sum(dtype=torch.int64))
    return digests
