"""Methods under FSDP2 and tensor parallelism on two CPU processes, started by test_sharded_methods.py."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.core.state.fingerprint import fingerprint

LAYERS: dict[str, Any] = {"targets": ["up", "down"], "trainable": ["head"]}
METHODS = {
    "LoRA": lambda: lp.LoRA(r=2, **LAYERS),
    "LoRA PiSSA": lambda: lp.LoRA(r=2, init="pissa", **LAYERS),
    "DoRA": lambda: lp.DoRA(r=2, **LAYERS),
    "AdaLoRA": lambda: lp.AdaLoRA(target_r=1, init_r=3, **LAYERS),
    "VeRA": lambda: lp.VeRA(r=4, **LAYERS),
    "LoHa": lambda: lp.LoHa(r=2, **LAYERS),
    "LoKr": lambda: lp.LoKr(r=2, **LAYERS),
    "OFT": lambda: lp.OFT(**LAYERS),
    "SSF": lambda: lp.SSF(**LAYERS),
    "BottleneckAdapter": lambda: lp.BottleneckAdapter(bottleneck_size=2, **LAYERS),
    "BitFit": lambda: lp.BitFit(),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(L.LightningModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def configure_model(self) -> None:
        if hasattr(self, "blocks"):
            return
        torch.manual_seed(7)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 2)
        if self.how != "tensor first":
            lp.apply(self)
        if self.how == "fsdp2":
            for part in [*self.blocks, self]:
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        elif self.how != "plain":
            for block in self.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(how: str, method: lp.PEFTMethod) -> dict[str, torch.Tensor]:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"devices": 1}
    if how != "plain":
        sizes = (2, 1) if how == "fsdp2" else (1, 2)
        options = {"devices": 2, "strategy": ModelParallelStrategy(*sizes, process_group_backend="gloo")}
    quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", callbacks=[method], logger=False, use_distributed_sampler=False,
        **options, **quiet,
    )  # fmt: skip
    module = Net(how)
    trainer.fit(module, DataLoader(TensorDataset(x, torch.arange(8) % 2), batch_size=8))  # the same on both ranks
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in module.named_parameters()}


def fingerprint_of_shards() -> dict[str, Any]:
    """The fingerprint of a sharded base compared with that of the whole, and the number of gathered tensors."""
    torch.manual_seed(7)
    model = nn.Sequential(Block(), nn.Linear(16, 3), nn.Conv1d(3, 5, 2))  # 3 and 5 do not divide by two ranks
    lp.apply(model, lp.LoRA(r=2, targets=["up"]))
    whole, gathered = fingerprint(model), []
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    full_tensor = DTensor.full_tensor
    DTensor.full_tensor = lambda self: gathered.append(self) or full_tensor(self)  # type: ignore[method-assign]
    try:
        return {"same": fingerprint(model) == whole, "values": len(whole["values"]), "gathered": len(gathered)}
    finally:
        DTensor.full_tensor = full_tensor  # type: ignore[method-assign]


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    torch.manual_seed(7)
    head = nn.Sequential(Block(), Block(), nn.Linear(16, 2))[2].weight.detach()  # as it starts
    for name, make in METHODS.items():
        plain = fit("plain", make())
        sharded = fit("fsdp2", make())
        assert plain.keys() == sharded.keys()
        assert name == "BitFit" or (plain["head.weight"] - head).abs().max() > 1e-3
        found[name] = max((plain[k] - sharded[k]).abs().max().item() for k in plain)
    lokr = {"split": lambda: METHODS["LoKr"](), "one": lambda: lp.LoKr(r=2, targets=["down"], trainable=["head"])}
    for how in ("tensor", "tensor first"):
        for name, make in {**lokr, "bottleneck": METHODS["BottleneckAdapter"]}.items():
            try:
                fit(how, make())
                found[f"{how}, {name}"] = "no error"
            except Exception as error:
                found[f"{how}, {name}"] = f"{type(error).__name__}: {error}"
    plain = fit("plain", lp.NormTuning(trainable=["head"]))
    tensor = fit("tensor", lp.NormTuning(trainable=["head"]))
    found["beside"] = max((plain[k] - tensor[k]).abs().max().item() for k in plain)
    found["fingerprint"] = fingerprint_of_shards()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads must not outlive the interpreter


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
