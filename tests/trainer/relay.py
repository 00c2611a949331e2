"""One run that changes its strategy and number of devices at every checkpoint; sharded_methods_run.py calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

import lightning_peft as lp
from lightning_peft.core.class_swap import original_class
from tests.trainer.tensor_parallel import LAYERS, Net, apart, fit, loader

#: each stage resumes from the previous one and trains one epoch
STAGES = (
    *("one device", "FSDP1", "FSDP2", "DDP", "FSDP2, sharded file", "one device", "FSDP1, sharded file", "DDP"),
    *("tensor parallel, sharded file", "FSDP1", "tensor parallel", "FSDP1, sharded file", "FSDP2", "one device"),
)


class FSDP1OnCPU(FSDPStrategy):
    """Lightning's strategy on the CPU, where the Trainer refuses the class itself, and which has no index."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        options = {"cpu_offload": self.cpu_offload, "mixed_precision": self.mixed_precision_config, **self.kwargs}
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, sharding_strategy=self.sharding_strategy, device_id=cpu, **options)


class Runner(Net):
    def __init__(self, how: str) -> None:
        super().__init__(parallel=how.startswith("tensor"))
        self.how = how

    def configure_model(self) -> None:
        super().configure_model()
        if self.how.startswith("FSDP2") and not isinstance(self, FSDPModule):
            lp.apply(self)
            for part in (*self.blocks, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def relay(folder: Path) -> dict[str, float]:
    """The largest difference from one uninterrupted run on one device after each stage."""
    found: dict[str, float] = {}
    path: Path | None = None
    for epochs, how in enumerate(STAGES, 1):
        plain = fit(lp.LoRA(r=3, **LAYERS), epochs, False)
        module, run = Runner(how), _trainer(how, epochs)
        L.seed_everything(3, verbose=False)
        run.fit(module, loader(), ckpt_path=path)
        # On one device both processes are the first one, and both write.
        path = folder / f"relay-{epochs}-{dist.get_rank() if how == 'one device' else ''}.ckpt"
        run.save_checkpoint(path)
        path = folder / path.name.replace("-1.ckpt", "-0.ckpt")
        dist.barrier()
        found[f"{epochs}: {how}"] = apart(module, plain)
    return found


#: an nn.MultiheadAttention is one unit, because it reads its out_proj (of a subclass of nn.Linear) without calling it
_UNITS = CustomPolicy(lambda module: original_class(module) in (nn.Linear, nn.MultiheadAttention))


def strategy_of(how: str) -> Strategy:
    """A strategy for two gloo processes."""
    gloo, folder = {"process_group_backend": "gloo"}, how.endswith("sharded file")
    if how == "DDP":
        return DDPStrategy(**gloo)
    if how.startswith("FSDP1"):
        return FSDP1OnCPU(auto_wrap_policy=_UNITS, state_dict_type="sharded" if folder else "full", **gloo)
    sizes = (1, 2) if how.startswith("tensor") else (2, 1)
    return ModelParallelStrategy(*sizes, save_distributed_checkpoint=folder, **gloo)


def _trainer(how: str, epochs: int) -> L.Trainer:
    options: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    if how != "one device":
        options["strategy"] = strategy_of(how)
    devices = 1 if how == "one device" else 2
    method = lp.LoRA(r=3, **LAYERS)
    options |= {"accelerator": "cpu", "devices": devices, "callbacks": [method], "logger": False}
    return L.Trainer(max_epochs=epochs, use_distributed_sampler=False, **options)
