"""DeepSpeed stages 1 and 2 compared with one device; test_deepspeed.py starts it, on the CPU or a GPU."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, deepspeed

import lightning_peft as lp
from tests.trainer.tensor_parallel import LAYERS, Net, apart, error_of, loader


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy without its checks for a GPU; DeepSpeed itself runs on the CPU with DS_ACCELERATOR=cpu."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class Groups(Net):
    """A module with a parameter group of which every parameter is frozen, and a scheduler with a value per group."""

    def configure_optimizers(self) -> Any:
        frozen = list(self.blocks[0].norm.parameters())
        others = [p for p in self.parameters() if all(p is not other for other in frozen)]
        optimizer = torch.optim.AdamW([{"params": frozen, "lr": 0.1}, {"params": others}], lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda step: 0.9**step])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


ACCELERATOR = "cpu"


def fit(stage: int, epochs: int, module: Net, ckpt: Path | None = None, save: Path | None = None, **more: Any) -> Net:
    L.seed_everything(3, verbose=False)
    options: dict[str, Any] = {"accelerator": ACCELERATOR, "devices": 1, **more}
    if stage:
        make = OnCPU if ACCELERATOR == "cpu" else DeepSpeedStrategy
        backend = {"process_group_backend": "gloo"} if ACCELERATOR == "cpu" else {}
        options |= {"strategy": make(stage=stage, **backend), "devices": int(os.environ["WORLD_SIZE"])}
    options |= {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    method = lp.LoRA(r=3, dropout=0.1, **LAYERS)
    run = L.Trainer(callbacks=[method], logger=False, max_epochs=epochs, use_distributed_sampler=False, **options)
    run.fit(module, loader(), ckpt_path=ckpt)
    if save is not None:
        run.save_checkpoint(save)
    return module.cpu()


class Unheld(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters())


def main(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in (Net, Groups):
        plain = fit(0, 4, kind(), gradient_clip_val=0.1)
        for stage in (1, 2):
            path = folder / f"{kind.__name__}{stage}.ckpt"
            out[f"{kind.__name__}, {stage}"] = apart(fit(stage, 4, kind(), gradient_clip_val=0.1), plain)
            fit(stage, 2, kind(), save=path, gradient_clip_val=0.1)
            resumed = fit(stage, 4, kind(), ckpt=path, gradient_clip_val=0.1)
            out[f"{kind.__name__}, {stage}, resumed"] = apart(resumed, plain)
    out["unheld"] = error_of(lambda: fit(1, 1, Unheld()))
    saved = torch.load(path / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)
    out["saved"] = sorted(saved["module"])
    out["trained"] = sorted(n for n, p in resumed.named_parameters() if p.requires_grad)
    return out


if __name__ == "__main__":
    ACCELERATOR = sys.argv[1]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ACCELERATOR == "cpu":
        deepspeed._validate_device_index_selection = lambda parallel_devices: None
    found = main(Path(sys.argv[2]))
    if os.environ["RANK"] == "0":
        (Path(sys.argv[2]) / "out.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # gloo's threads must not outlive the interpreter
