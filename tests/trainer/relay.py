"""One run that changes its strategy and number of devices at every checkpoint; sharded_methods_run.py calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

import lightning_peft as lp
from tests.trainer.tensor_parallel import LAYERS, Net, apart, fit, loader

#: each stage resumes from the previous one and trains one epoch
STAGES = (
    *("one device", "DDP", "one device", "FSDP2", "DDP", "FSDP2, sharded file", "tensor parallel", "one device"),
    *("tensor parallel, sharded file", "FSDP2"),
)


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


def _trainer(how: str, epochs: int) -> L.Trainer:
    options: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    gloo = {"process_group_backend": "gloo"}
    if how == "DDP":
        options["strategy"] = DDPStrategy(**gloo)
    elif how != "one device":
        sizes = (1, 2) if how.startswith("tensor") else (2, 1)
        options["strategy"] = ModelParallelStrategy(
            *sizes, save_distributed_checkpoint=how.endswith("sharded file"), **gloo
        )
    devices = 1 if how == "one device" else 2
    method = lp.LoRA(r=3, **LAYERS)
    options |= {"accelerator": "cpu", "devices": devices, "callbacks": [method], "logger": False}
    return L.Trainer(max_epochs=epochs, use_distributed_sampler=False, **options)
