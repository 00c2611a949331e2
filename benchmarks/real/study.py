"""What the studies share: a row of the table is one run of a Trainer."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

import lightning_peft as lp

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LIGHTNING_PEFT_DATA", ROOT.parent / "shared" / "data"))


class MissingData(RuntimeError):
    """A study cannot run here; the message says what is absent."""


def need(path: str) -> Path:
    """The path of a file or folder of the data, which is not part of the repository."""
    if not (DATA / path).exists():
        raise MissingData(f"there is no {path} in {DATA}: set LIGHTNING_PEFT_DATA to the folder that holds it")
    return DATA / path


@dataclass(frozen=True)
class Row:
    """One method of a study.

    Attributes:
        label: its name in the table.
        method: its class in ``lightning_peft``; ``None`` evaluates the base as it is.
        arguments: of the class, ``trainable`` aside where the study gives it to all.
        lr: peak learning rate, the best of the study's grid on data that the test does not use.
    """

    label: str
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.0


@dataclass
class Result:
    """What one run gave. ``scores`` and ``samples`` are the study's."""

    label: str
    lr: float
    trainable: int
    total: int
    step_ms: float | None
    checkpoint: int
    scores: dict[str, float]
    samples: list[str]

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


class Study(ABC):
    """One base model, one task, and the methods that are compared on it.

    Subclasses set the class variables and give the four methods. ``metrics`` maps a score's name to how it is
    printed; the first is the one that is plotted and by which a learning rate is chosen.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    task: ClassVar[str]
    metrics: ClassVar[dict[str, str]]
    higher_is_better: ClassVar[bool]
    steps: ClassVar[int]
    grid: ClassVar[str]
    rows: ClassVar[tuple[Row, ...]]
    prompts: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def prepare(self, folder: Path, tuning: bool) -> None:
        """Check that everything is there and write what the data modules read into ``folder``.

        With ``tuning``, data that the final test does not use stands in for the test data.
        """

    @abstractmethod
    def module(self, lr: float) -> L.LightningModule:
        """The pretrained model in its task."""

    @abstractmethod
    def data(self) -> L.LightningDataModule:
        """The data, with its test split."""

    @abstractmethod
    def scores(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
        """The values of ``metrics``, after training."""

    def samples(self, module: L.LightningModule) -> list[str]:
        """What it writes for each of ``prompts``."""
        return []

    def run(self, row: Row, lr: float, steps: int, seed: int) -> Result:
        """Train and evaluate one row; the base is evaluated only."""
        with tempfile.TemporaryDirectory() as folder, _quiet():
            L.seed_everything(seed, verbose=False)
            module, data, clock = self.module(lr), self.data(), _Stopwatch()
            callbacks: list[L.Callback] = [clock]
            if row.method is not None:
                callbacks.append(getattr(lp, row.method)(**row.arguments))
            trainer = L.Trainer(
                accelerator="cpu",
                max_steps=steps,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            path = Path(folder) / "trained.ckpt"
            if row.method is not None:
                trainer.fit(module, data)
                trainer.save_checkpoint(path, weights_only=True)
                trainable = sum(p.numel() for p in lp.trainable_parameters(module))
            else:
                trainable = 0
            scores = self.scores(trainer, module, data)
            size = path.stat().st_size if path.exists() else 0
            return Result(
                label=row.label,
                lr=lr,
                trainable=trainable,
                total=sum(p.numel() for p in module.parameters()),
                step_ms=1e3 * statistics.median(clock.seconds) if clock.seconds else None,
                checkpoint=size,
                scores=scores,
                samples=self.samples(module),
            )


class _Stopwatch(L.Callback):
    """Seconds of each training step: forward, backward and the optimizer's, without loading the batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide the tables that each run prints; collect the last run's garbage first."""
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
