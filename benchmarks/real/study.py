"""The common part of the studies. Each table row is a learning-rate search, then one Trainer run per seed."""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

import lightning_peft as lp
from benchmarks.real.store import Result, Setting
from lightning_peft.compare.measure import checkpoint_size, quiet

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LIGHTNING_PEFT_DATA", ROOT.parent / "shared" / "data"))


class MissingData(RuntimeError):
    """A study cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One method of a study.

    Attributes:
        label: its name in the table.
        method: its class in ``lightning_peft``; ``None`` evaluates the base as it is.
        arguments: the arguments of the class.
        lr: the peak learning rate at which the search starts, one of 1e-4, 3e-4, 1e-3, 3e-3, ...
        lr_of: the label of a similar row whose searched rate is used instead.
        probe: whether the row is a variant of a method, shown in the second table.
    """

    label: str
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lr: float = 0.0
    lr_of: str = ""
    probe: bool = False

    @property
    def call(self) -> str:
        """The callback as source code."""
        return f"{self.method}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


class Study(ABC):
    """A base model, a task, and the methods to compare on it.

    Subclasses set the class variables and implement the four methods. ``metrics`` maps the name of a score to its
    format. The first score is plotted; ``"loss"`` is used to choose a learning rate.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    task: ClassVar[str]
    metrics: ClassVar[dict[str, str]]
    higher_is_better: ClassVar[bool]
    steps: ClassVar[int]
    search_steps: ClassVar[int]
    rows: ClassVar[tuple[Row, ...]]
    prompts: ClassVar[tuple[str, ...]] = ()
    probes: ClassVar[str] = ""

    @abstractmethod
    def prepare(self, folder: Path, tuning: bool) -> None:
        """Check that no file is missing, and write the files that the data modules read into ``folder``.

        With ``tuning``, the test split is data that the final test does not use.
        """

    @abstractmethod
    def module(self, lr: float) -> L.LightningModule:
        """The LightningModule with the pretrained model."""

    @abstractmethod
    def data(self) -> L.LightningDataModule:
        """The data, with its test split."""

    @abstractmethod
    def scores(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
        """The values of ``metrics`` after training; during the search, ``"loss"`` is enough."""

    def samples(self, module: L.LightningModule) -> list[str]:
        """The generated text for each of ``prompts``."""
        return []

    def setting(self, row: Row, lr: float, steps: int, seed: int, tuning: bool) -> Setting:
        """The key of a run of this study."""
        return Setting(self.name, row.call if row.method else "base", lr, steps, seed, tuning)

    def run(self, row: Row, lr: float, steps: int, seed: int, tuning: bool = False) -> Result:
        """Train and evaluate one row on the files that ``prepare`` wrote; the base is only evaluated."""
        start = time.perf_counter()
        gc.collect()  # free the memory of the last run first
        with tempfile.TemporaryDirectory() as folder, quiet():
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
            trainable = checkpoint = 0
            if row.method is not None:
                trainer.fit(module, data)
                checkpoint = checkpoint_size(trainer)
                trainable = sum(p.numel() for p in lp.trainable_parameters(module))
            scores = self.scores(trainer, module, data)
            return Result(
                setting=self.setting(row, lr, steps, seed, tuning),
                trainable=trainable,
                total=sum(p.numel() for p in module.parameters()),
                step_ms=1e3 * statistics.median(clock.seconds) if clock.seconds else None,
                checkpoint=checkpoint,
                scores=scores,
                samples=[] if tuning else self.samples(module),
                seconds=time.perf_counter() - start,
            )


def need(path: str) -> Path:
    """The path of a file or folder of the data, which is not part of the repository."""
    if not (DATA / path).exists():
        raise MissingData(f"there is no {path} in {DATA}: set LIGHTNING_PEFT_DATA to the folder that holds it")
    return DATA / path


def search(start: float, loss: Callable[[float], float]) -> float:
    """Return the learning rate among 1e-4, 3e-4, 1e-3, ... that is better than both of its neighbours.

    The search moves up or down from ``start`` until the best rate has been tried on both sides. A loss of NaN counts as
    worse than any number.
    """
    losses: dict[int, float] = {}

    def at(step: int) -> float:
        if step not in losses:
            found = loss(_rate(step))
            losses[step] = found if math.isfinite(found) else math.inf
        return losses[step]

    best = round(2 * math.log10(start))
    while at(best) == math.inf:
        if _rate(best) < 1e-7:
            raise ValueError(f"the loss is NaN at every rate from {start:g} down to {_rate(best):g}")
        best -= 1
    while True:
        better = min((best - 1, best, best + 1), key=lambda step: (at(step), abs(step - best)))
        if better == best:
            return _rate(best)
        best = better


def _rate(step: int) -> float:
    """Two rates per decade: 1e-3 is step -6, 3e-3 is step -5."""
    return float(f"{(1, 3)[step % 2]}e{step // 2}")


class _Stopwatch(L.Callback):
    """Records the CPU seconds of each training step: forward, backward and optimizer, without loading the batch.

    CPU time instead of wall time, so that other work on the machine has little effect.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self._start)
