"""A small fit in two processes, started in different ways by test_launch.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from tests.trainer.toys import Toy, loader, lora, trainer

START_METHODS = {"spawn": "spawn", "fork": "fork"}


class Die(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_rank == 1:
            raise ValueError("this rank dies on purpose")


def main(how: str, folder: Path, *callbacks: Callback) -> None:
    L.seed_everything(3, verbose=False)
    kind = START_METHODS.get(how, "popen")
    save = ModelCheckpoint(folder, filename="end")
    run = trainer(
        folder,
        save,
        *callbacks,
        method=lora(),
        max_epochs=1,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method=kind),
    )
    run.fit(Toy(), loader())
    print(f"ended, {run.world_size} processes")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
    if sys.argv[1] == "fork":
        main(sys.argv[1], Path(sys.argv[2]), Die())
