"""One distributed run on the CPU, started by test_distributed.py under torchrun-like environment variables."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from tests.trainer.toys import loader, lora, same, trainer, val_loader

WIDTH = 1024


class Big(L.LightningModule):
    """A base of several MB whose blocks use activation checkpointing and, under FSDP2, sharding."""

    def __init__(self, shard: bool = False, base_seed: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self) -> None:
        if hasattr(self, "blocks"):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams.base_seed)
            self.blocks = nn.ModuleList(
                [nn.Linear(16, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 64), nn.Dropout(0.2))]
            )
            self.head = nn.Linear(64, 2)
        self.register_buffer("seen", torch.zeros(2))  # changes without gradients
        if self.hparams.shard and dist.is_initialized():
            from torch.distributed.fsdp import fully_shard

            lp.apply(self)
            for block in [*self.blocks, self.head]:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x) if self.hparams.shard else checkpoint(block, x, use_reentrant=False))
        return self.head(x)

    def training_step(self, batch, index):
        self.seen += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


class Agreement(Callback):
    """Records whether all ranks hold the same trainable state."""

    def __init__(self) -> None:
        self.seen: dict[str, bool] = {}

    def check(self, when: str, module: L.LightningModule) -> None:
        mine = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        if any(hasattr(p, "full_tensor") for p in mine.values()):
            return
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.seen[when] = all(same(everyone[0], other) for other in everyone)

    def on_train_start(self, trainer, pl_module):
        self.check("start", pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.check(f"step {trainer.global_step}", pl_module)


def strategy_of(kind: str):
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=kind == "fsdp2-shards", process_group_backend="gloo")


def full_state(module):
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in tensors.items()}


def damaged(root: Path, load: Any) -> dict[str, str]:
    """The errors for checkpoints in which one file was changed, truncated, removed or taken from another checkpoint."""
    errors = {}
    for how in ("bit", "cut", "removed", "mixed", "metadata"):
        path = root / "damaged" / how
        if dist.get_rank() == 0:
            shutil.copytree(root / "full" / "step=2.ckpt", path)
            file = path / ("__0_0.distcp" if how != "metadata" else ".metadata")
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            if how == "removed":
                file.unlink()
            elif how == "mixed":
                shutil.copy(root / "full" / "step=3.ckpt" / file.name, file)
            else:
                file.write_bytes(data[: 100 if how == "cut" else None])
        dist.barrier()
        try:
            load(path)
            errors[how] = "no error"
        except Exception as error:
            errors[how] = f"{type(error).__name__}: {error}"
    return errors


def main(kind: str, root: Path) -> None:
    shard = kind.startswith("fsdp2")
    out = {}

    def fit(name, *callbacks, ckpt=None, module=None, method=None, **options):
        L.seed_everything(3 if ckpt is None else 99, verbose=False)
        module = module or Big(shard=shard)
        defaults = {"max_epochs": 2, "devices": 2, "strategy": strategy_of(kind), "num_sanity_val_steps": 0}
        run = trainer(root / name, *callbacks, method=method or lora(), **{**defaults, **options})
        run.fit(module, loader(num_workers=0), val_loader(), ckpt_path=ckpt)
        return module, run

    agreement = Agreement()
    steps = ModelCheckpoint(root / "full", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    weights = ModelCheckpoint(root / "weights", filename="w{step}", save_weights_only=True)
    module, run = fit("a", steps, weights, agreement)
    expected, optimizer = full_state(module), run.strategy.optimizer_state(run.optimizers[0])
    out["trainable"] = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    out["total"] = sum(p.numel() * 4 for p in module.parameters())
    out["agree"] = agreement.seen
    out["resumed"] = {}
    for step in (2, 3, 4):
        again = Agreement()
        resumed, r = fit(f"b{step}", again, ckpt=root / "full" / f"step={step}.ckpt", enable_checkpointing=False)
        out["resumed"][step] = [
            same(full_state(resumed), expected),
            same(r.strategy.optimizer_state(r.optimizers[0]), optimizer),
        ]
        out["agree"] |= {f"resumed {step}, {k}": v for k, v in again.seen.items()}

    # A method that draws random numbers during training, under the seed of the whole run.
    def dylora():
        return lp.DyLoRA(r=4, trainable=["head"])

    steps = ModelCheckpoint(root / "drawn", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    drawn = full_state(fit("drawn", steps, method=dylora())[0])
    again = fit("e", ckpt=root / "drawn" / "step=2.ckpt", method=dylora(), enable_checkpointing=False)[0]
    out["resumed draws"] = same(full_state(again), drawn)

    lp.save_adapter(module, root / "adapter")  # called on every rank, as a sharded model requires
    if not shard and dist.get_rank() == 0:
        lp.save_adapter(module, root / "alone")  # called on rank 0 only, as users often do
    dist.barrier()
    for folder in ("adapter", *(["alone"] if not shard else [])):
        plain = Big()
        plain.configure_model()
        lp.load_adapter(plain, root / folder)
        found = {
            n.replace("adapters.default.weight", "weight").replace("adapters.default.bias", "bias"): p
            for n, p in plain.named_parameters()
            if ".adapters." in n
        }
        out[f"saved {folder}"] = len(found) == 8 and all(torch.equal(p, expected[n]) for n, p in found.items())

    # weights only: enough for validation
    r = trainer(root / "v", devices=2, strategy=strategy_of(kind), enable_checkpointing=False)
    r.validate(Big(shard=shard), val_loader(), ckpt_path=str(next((root / "weights").iterdir())), verbose=False)
    out["validated"] = float(r.callback_metrics["val_loss"])
    r = trainer(root / "v", devices=2, strategy=strategy_of(kind), enable_checkpointing=False)
    r.validate(
        module if not shard else Big(shard=shard),
        val_loader(),
        verbose=False,
        **({"ckpt_path": str(root / "full" / "step=6.ckpt")} if shard else {}),
    )
    out["expected"] = float(r.callback_metrics["val_loss"])

    if kind == "fsdp2-shards":
        out["damaged"] = damaged(root, lambda ckpt: fit("damaged", ckpt=ckpt, enable_checkpointing=False))
        full, good = root / "full", root / "full" / "step=2.ckpt"
        if dist.get_rank() == 0:  # the state after a kill between the two moves of a replacement
            shutil.copytree(good, full / ".killed.ckpt.tmp")
            shutil.copytree(full / "step=3.ckpt", full / ".killed.ckpt.old")
        dist.barrier()
        out["resumed"]["killed"] = [same(full_state(fit("k", ckpt=full / "killed.ckpt")[0]), expected), True]
        run.save_checkpoint(good)  # over an existing checkpoint
        left = sorted(p.name for p in full.iterdir() if p.name.startswith("."))
        out["left"] = [left, sorted(p.name for p in good.iterdir())]

    for what, options in {"rank": {"method": lora(r=2)}, "base": {"module": Big(shard=shard, base_seed=8)}}.items():
        try:
            fit(f"wrong {what}", ckpt=root / "full" / "step=2.ckpt", enable_checkpointing=False, **options)
            out[what] = "no error"
        except Exception as error:
            out[what] = f"{type(error).__name__}: {error}"

    class Uneven(type(lora())):
        def build(self, site):
            adapter = super().build(site)
            adapter.lora_A.data += dist.get_rank()
            return adapter

    uneven = {"seed": lora(seed=dist.get_rank())}
    if not shard:
        uneven["weights"] = Uneven(r=4, trainable=["head"])
    for what, method in uneven.items():
        try:
            fit("uneven", method=method, enable_checkpointing=False, max_steps=1)
            out[f"uneven {what}"] = "no error"
        except Exception as error:
            out[f"uneven {what}"] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        (root / "out.json").write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads must end before the interpreter does


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
