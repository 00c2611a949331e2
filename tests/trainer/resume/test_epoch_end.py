"""Resume from checkpoints that were saved after the last batch of an epoch, but before its validation and its hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.trainer.toys import Stream, Toy, loader, lora, same, state_of, trainer, val_loader


class Seen(Callback):
    """The hooks of epochs and validation that a run calls, with the global step."""

    def __init__(self) -> None:
        self.hooks: list[tuple[str, int, int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for name in ("on_train_epoch_start", "on_train_epoch_end", "on_validation_end"):
            setattr(self, name, lambda t, m, name=name: self.hooks.append((name, t.current_epoch, t.global_step)))


class Plateau(Toy):
    """The learning rate depends on the validation loss, and validation draws random numbers."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss((batch[0] + torch.randn(16), batch[1])))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def fit(root: Path, train: Any, options: dict[str, Any], ckpt: Path | None = None) -> tuple[Any, list[Any]]:
    L.seed_everything(3 if ckpt is None else 99, verbose=False)
    save = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    seen, module = Seen(), Plateau()
    run = trainer(root, save, seen, method=lora(), num_sanity_val_steps=0, **{"max_epochs": 3, **options})
    run.fit(module, train(), val_loader(), ckpt_path=ckpt)
    return [state_of(module, run), float(run.callback_metrics["val_loss"])], seen.hooks


CASES = {
    "plain": (loader, {}),
    "workers": (lambda: loader(num_workers=1), {}),
    "no length": (lambda: loader(Stream()), {}),
    "steps": (loader, {"max_epochs": -1, "max_steps": 13}),
    "reloaded": (loader, {"reload_dataloaders_every_n_epochs": 1}),
    "accumulation": (loader, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_epoch_is_finished_first(tmp_path: Path, case: str) -> None:
    train, options = CASES[case]
    expected, hooks = fit(tmp_path / "a", train, options)
    per_epoch = 3 if case == "accumulation" else 5
    for step in (per_epoch, 2 * per_epoch):
        found, after = fit(tmp_path / f"b{step}", train, options, tmp_path / "a" / f"step={step}.ckpt")
        assert same(found, expected)
        assert after == hooks[hooks.index(("on_validation_end", step // per_epoch - 1, step)) :]
    for step in (per_epoch + 1, 2 * per_epoch):  # a checkpoint of a run that had itself resumed from such a checkpoint
        ckpt = tmp_path / f"b{per_epoch}" / f"step={step}.ckpt"
        assert same(fit(tmp_path / "c", train, options, ckpt)[0], expected), step
