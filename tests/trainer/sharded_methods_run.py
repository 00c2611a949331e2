"""Every method under DDP and FSDP2, and tensor parallelism, on two CPU processes; test_sharded_methods.py starts it."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from benchmarks.faults import Module, inside_net, kind_of
from lightning_peft.core.state.fingerprint import fingerprint
from tests.kinds import KINDS
from tests.strategies import ROWS, STRATEGIES
from tests.table import METHODS as TABLE

LAYERS: dict[str, Any] = {"targets": ["up", "down"], "trainable": ["head"]}


class Sharded(Module):
    """The module of the fault tests, which shards itself if it is told to."""

    def __init__(self, kind: str, shard: bool) -> None:
        super().__init__(kind)
        self.shard = shard

    def configure_model(self) -> None:
        if self.shard and not isinstance(self, FSDPModule):
            lp.apply(self)
            for part in [*(m for m in self.net.children() if type(m) is not nn.ModuleList), self]:
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def fit_method(method: str, how: str) -> dict[str, torch.Tensor]:
    """Fit the same batches on both ranks; return all parameters."""
    kind = kind_of(ROWS[method])
    options: dict[str, Any] = {"devices": 1 if how == "plain" else 2}
    if how != "plain":
        gloo = {"process_group_backend": "gloo"}
        options["strategy"] = DDPStrategy(**gloo) if how == "DDP" else ModelParallelStrategy(2, 1, **gloo)
    L.seed_everything(3, verbose=False)
    module = Sharded(kind, how == "FSDP2")
    made = TABLE[ROWS[method]].make(inside_net(KINDS[kind]))
    quick_trainer(made, max_epochs=1, limit_val_batches=0, **options).fit(module)
    return full_values(module)


def quick_trainer(method: lp.PEFTMethod, **options: Any) -> L.Trainer:
    quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    return L.Trainer(
        accelerator="cpu", callbacks=[method], logger=False, use_distributed_sampler=False, **quiet, **options
    )


def full_values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in module.named_parameters()}


def every_method() -> dict[str, Any]:
    """The largest difference of each method from one device, by method and strategy; or its error."""
    found: dict[str, Any] = {}
    for method in ROWS:
        plain = fit_method(method, "plain")
        for how in STRATEGIES:
            try:
                values = fit_method(method, how)
                assert plain.keys() == values.keys()
                found[f"{method}, {how}"] = max((plain[k] - values[k]).abs().max().item() for k in plain)
            except Exception as error:
                found[f"{method}, {how}"] = f"{type(error).__name__}: {error}"
    return found


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
        if self.how != "plain":
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
        options = {"devices": 2, "strategy": ModelParallelStrategy(1, 2, process_group_backend="gloo")}
    module = Net(how)
    data = DataLoader(TensorDataset(x, torch.arange(8) % 2), batch_size=8)  # the same on both ranks
    quick_trainer(method, max_epochs=6, **options).fit(module, data)
    return full_values(module)


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
    found = every_method()
    lokr = {"split": lambda: lp.LoKr(r=2, **LAYERS), "one": lambda: lp.LoKr(r=2, targets=["down"], trainable=["head"])}
    for how in ("tensor", "tensor first"):
        for name, make in {**lokr, "bottleneck": lambda: lp.BottleneckAdapter(bottleneck_size=2, **LAYERS)}.items():
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
