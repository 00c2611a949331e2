"""Learning curves of a fit: ``curves.csv`` and ``curves.png`` next to the checkpoint, with any logger."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import lightning as L

__all__ = ["LearningCurves"]


class LearningCurves(L.Callback):
    """Records the training loss at every logging step, and all metrics after each validation."""

    def __init__(self) -> None:
        self._points: dict[str, dict[int, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._record(trainer, ("train/", "train_", "loss"))

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._record(trainer, ("val/", "val_", "valid"))

    def _record(self, trainer: L.Trainer, begins: tuple[str, ...]) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(begins) and not name.endswith("_epoch"):
                self._points.setdefault(name, {})[trainer.global_step] = float(value)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if not trainer.is_global_zero or not self._points or folder is None or not Path(folder).is_dir():
            return
        with (Path(folder) / "curves.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["metric", "step", "value"])
            rows.writerows([name, step, value] for name, at in self._points.items() for step, value in at.items())
        if importlib.util.find_spec("matplotlib") is not None:
            self._plot(Path(folder) / "curves.png")

    def _plot(self, path: Path) -> None:
        """Draw the losses and the other metrics in separate panels, because their scales differ."""
        from matplotlib.figure import Figure

        losses = {name: at for name, at in self._points.items() if "loss" in name}
        panels = [part for part in (losses, {n: at for n, at in self._points.items() if n not in losses}) if part]
        figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
        for axes, part in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for name, at in part.items():
                axes.plot([*at], [*at.values()], label=name, marker="." if len(at) < 30 else None)
            axes.set_xlabel("step")
            axes.legend()
        figure.savefig(path, dpi=150)
