"""Adapters on tensor-parallel layers compared with one device; sharded_methods_run.py calls it on two processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.core.names import canonical

LAYERS: dict[str, Any] = {"targets": ["up", "down"], "trainable": ["head"]}
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))

#: methods whose code depends on how a layer is split, with dropout where it acts on the split input; 3 divides nothing
METHODS: dict[str, Callable[[], lp.PEFTMethod]] = {
    "LoRA": lambda: lp.LoRA(r=3, dropout=0.3, bias="all", **LAYERS),
    "PiSSA": lambda: lp.LoRA(r=3, init="pissa", lora_bias=True, **LAYERS),
    "DoRA": lambda: lp.DoRA(r=3, dropout=0.3, **LAYERS),
    "HiRA": lambda: lp.HiRA(r=3, dropout=0.3, **LAYERS),
    "LoKr": lambda: lp.LoKr(r=2, decompose_both=True, rank_dropout=0.3, module_dropout=0.1, **LAYERS),
    "OFT": lambda: lp.OFT(block_size=16, dropout=0.3, coft=True, eps=0.1, **LAYERS),
    "MiSS": lambda: lp.MiSS(r=3, **LAYERS),
    "bottleneck": lambda: lp.BottleneckAdapter(bottleneck_size=2, stochastic_depth=0.2, norm_before=True, **LAYERS),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(L.LightningModule):
    """Blocks whose activations stay split between a column-parallel and a row-parallel layer."""

    def __init__(self, mesh: DeviceMesh | None = None, parallel: bool = False, apply_first: bool = False) -> None:
        super().__init__()
        self.mesh, self.parallel, self.apply_first = mesh, parallel, apply_first

    def configure_model(self) -> None:
        if hasattr(self, "blocks"):
            return
        torch.manual_seed(7)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 2)
        if self.apply_first:
            lp.apply(self)
        for block in self.blocks if self.parallel else ():
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, self.mesh or self.device_mesh["tensor_parallel"], plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(
    method: lp.PEFTMethod, epochs: int, parallel: bool, ckpt: Path | None = None, save: Path | None = None, **more: Any
) -> Net:
    """Fit the same batch on all ranks, once per epoch."""
    L.seed_everything(3, verbose=False)
    module = Net(parallel=parallel)
    run = trainer(method, parallel, sharded=save is not None and save.suffix == ".shards", max_epochs=epochs, **more)
    run.fit(module, loader(), ckpt_path=ckpt)
    if save is not None:
        run.save_checkpoint(save)
    return module


def trainer(method: lp.PEFTMethod, parallel: bool, sharded: bool = False, **options: Any) -> L.Trainer:
    options |= {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    options |= {"devices": 2 if parallel else 1, "use_distributed_sampler": False}
    if parallel:
        options["strategy"] = ModelParallelStrategy(
            1, 2, save_distributed_checkpoint=sharded, process_group_backend="gloo"
        )
    return L.Trainer(accelerator="cpu", callbacks=[method], logger=False, **options)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, torch.arange(8) % 2), batch_size=8)


def full_values(module: nn.Module) -> dict[str, torch.Tensor]:
    strategy: Any = module._trainer.strategy if isinstance(module, L.LightningModule) and module._trainer else None
    fsdp1 = isinstance(strategy, FSDPStrategy)
    with FullyShardedDataParallel.summon_full_params(strategy.model) if fsdp1 else nullcontext():
        return {
            canonical(n): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for n, p in module.named_parameters()
        }


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between the parameters of two modules."""
    a, b = full_values(one), full_values(other)
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compare(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Differences from one device by what was compared, and errors by what was tried."""
    found = {name: apart(fit(make(), 3, True), fit(make(), 3, False)) for name, make in METHODS.items()}

    def lora() -> lp.PEFTMethod:
        return lp.LoRA(r=3, **LAYERS)

    plain = fit(lora(), 4, False, gradient_clip_val=0.1)
    module = fit(lora(), 4, True, gradient_clip_val=0.1)
    found["clipped"] = apart(module, plain)
    plain = fit(lora(), 4, False)
    for name in ("tensor.ckpt", "tensor.shards"):
        fit(lora(), 2, True, save=folder / name)
        module = fit(lora(), 4, True, ckpt=folder / name)
        found[f"resumed from {name}"] = apart(module, plain)

    # A saved adapter runs in a model that is split, and in one that is not.
    lp.save_adapter(module, folder / "tensor_adapter")
    dist.barrier()
    expected = plain.eval()(X)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
    for parallel in (True, False):
        loaded = Net(mesh, parallel)
        loaded.configure_model()
        lp.load_adapter(loaded, folder / "tensor_adapter")
        loaded.eval()
        for how, change in {"loaded": None, "merged": lp.merge, "unmerged": lp.unmerge}.items():
            if change is not None:
                change(loaded)
            found[f"{how}, {parallel}"] = (loaded(X) - expected).abs().max().item()
        if parallel:
            errors = {"rows": error_of(lambda: _with_rows(loaded))}  # noqa: B023 - called at once
    first = Net(parallel=True, apply_first=True)
    errors["apply first"] = error_of(lambda: trainer(lora(), True).fit(first, loader()))
    return found, errors


def _with_rows(module: nn.Module) -> None:
    with lp.rows(module, ["default", None] * 4):
        module(X)
