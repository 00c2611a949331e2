"""FSDP1 beyond a plain fit; sharded_methods_run.py calls it on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lightning_peft as lp
from lightning_peft.core.names import canonical
from tests.trainer.relay import FSDP1OnCPU
from tests.trainer.tensor_parallel import LAYERS, Block, Net, X, apart, error_of, fit, full_values, loader


class Mixed(FSDPPrecision):
    """Lightning's precision, whose autocast names the GPU."""

    def forward_context(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


class Moving(Net):
    def on_train_batch_end(self, *args: Any) -> None:
        self.blocks[0].up.weight.data += 1


class Wrapped(Net):
    def configure_model(self) -> None:
        super().configure_model()
        lp.apply(self)
        self.blocks[0] = FullyShardedDataParallel(self.blocks[0], device_id=torch.device("cpu"), use_orig_params=True)


class OtherBase(Net):
    def configure_model(self) -> None:
        super().configure_model()
        self.blocks[1].down.weight.data += 1


def lora() -> lp.PEFTMethod:
    return lp.LoRA(r=3, **LAYERS)


def run(module: Net, epochs: int = 2, ckpt: Path | None = None, sharding: Any = "FULL_SHARD", **more: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    options: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    units: Any = {"auto_wrap_policy": {nn.Linear, Block}, "sharding_strategy": sharding}
    options |= {"strategy": FSDP1OnCPU(process_group_backend="gloo", **units), "use_distributed_sampler": False}
    options |= {"accelerator": "cpu", "devices": 2, "callbacks": [lora()], "logger": False, **more}
    trainer = L.Trainer(max_epochs=epochs, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return trainer


def compare(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Differences from one device by what was compared, and errors and other facts."""
    plain, found, facts = fit(lora(), 2, False), {}, {}
    found["clipped"] = apart(fitted(gradient_clip_val=0.1), fit(lora(), 2, False, gradient_clip_val=0.1))
    found["accumulated"] = apart(fitted(accumulate_grad_batches=2), fit(lora(), 2, False, accumulate_grad_batches=2))
    # Each rank sees half of the batch.
    found["averaged"] = apart(fitted(use_distributed_sampler=True), plain)
    for sharding in ("SHARD_GRAD_OP", "NO_SHARD"):
        ran = Net()
        run(ran, sharding=sharding)
        found[sharding] = (ran.head.weight - plain.head.weight).abs().max().item()

    module = Net()
    trainer = run(module)
    trainer.save_checkpoint(folder / "fsdp1.ckpt")
    lp.save_adapter(module, folder / "fsdp1_adapter")
    dist.barrier()
    loaded = Net()
    loaded.configure_model()
    lp.load_adapter(loaded, folder / "fsdp1_adapter")
    found["adapter"] = (loaded.eval()(X) - plain.eval()(X)).abs().max().item()
    before = full_values(module)
    module.validation_step = module.training_step  # type: ignore[method-assign]
    trainer.validate(module, loader(), verbose=False)
    after = full_values(module)
    found["validated"] = max((after[key] - before[key]).abs().max().item() for key in before)

    here = {canonical(name): p.numel() for name, p in module.named_parameters() if not p.requires_grad}
    facts["share"] = sum(here.values()) / sum(before[name].numel() for name in here)
    mixed = Net()
    state = run(mixed, plugins=[Mixed("bf16-mixed")]).strategy.lightning_module_state_dict()
    facts["mixed"] = sorted({str(value.dtype) for value in state.values()})
    moving = Moving()
    moved = run(moving)
    facts["moved"] = error_of(lambda: moved.save_checkpoint(folder / "moved.ckpt"))
    facts["merged"] = error_of(lambda: lp.merge(module))
    facts["wrapped"] = error_of(lambda: run(Wrapped()))
    facts["other base"] = error_of(lambda: run(OtherBase(), ckpt=folder / "fsdp1.ckpt"))
    return found, facts


def fitted(**options: Any) -> Net:
    module = Net()
    run(module, **options)
    return module
