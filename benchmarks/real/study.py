"""The common part of the studies. Each table row is a learning-rate search, then one Trainer run per seed."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

import lightning_peft as lp
from benchmarks.real.store import Result, Setting

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LIGHTNING_PEFT_DATA", ROOT.parent / "shared" / "data"))


class MissingData(RuntimeError):
    """A study cannot run here; the message says what is absent."""


@dataclass(frozen=True)
class Row:
    """One method of a study.

    Attributes:
        label: its name in the table.
        method: its class in ``lightning_peft``; ``None`` evaluates the base as it is.
        arguments: of the class.
        lr: where the search for the peak learning rate starts, a step of the ladder 1e-4, 3e-4, 1e-3, 3e-3, ...
        lr_of: the label of the row whose searched rate it takes instead, a close relative's.
        probe: this row is no method of the comparison but asks a question about one; it is in the second table.
    """

    label: str
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lr: float = 0.0
    lr_of: str = ""
    probe: bool = False

    @property
    def call(self) -> str:
        """The callback as one writes it."""
        return f"{self.method}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


class Study(ABC):
    """One base model, one task, and the methods that are compared on it.

    Subclasses set the class variables and give the four methods. ``metrics`` maps a score's name to how it is
    printed; the first is the one that is plotted, ``"loss"`` the one by which a learning rate is chosen.
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
        """The values of ``metrics``, after training; of ``"loss"`` at least while a rate is searched."""

    def samples(self, module: L.LightningModule) -> list[str]:
        """What it writes for each of ``prompts``."""
        return []

    def setting(self, row: Row, lr: float, steps: int, seed: int, tuning: bool) -> Setting:
        """What tells one run of this study from another."""
        return Setting(self.name, row.call if row.method else "base", lr, steps, seed, tuning)

    def run(self, row: Row, lr: float, steps: int, seed: int, tuning: bool = False) -> Result:
        """Train and evaluate one row, on what ``prepare`` made; the base is evaluated only."""
        start = time.perf_counter()
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
            return Result(
                setting=self.setting(row, lr, steps, seed, tuning),
                trainable=trainable,
                total=sum(p.numel() for p in module.parameters()),
                step_ms=1e3 * statistics.median(clock.seconds) if clock.seconds else None,
                checkpoint=path.stat().st_size if path.exists() else 0,
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
    """The learning rate of the ladder 1e-4, 3e-4, 1e-3, ... whose two neighbours are both worse.

    It goes up or down from ``start``, so that the best is never at the end of what was tried. A loss that is not a
    number is worse than any.
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
            raise ValueError(f"the loss is no number at any rate from {start:g} down to {_rate(best):g}")
        best -= 1
    while True:
        better = min((best - 1, best, best + 1), key=lambda step: (at(step), abs(step - best)))
        if better == best:
            return _rate(best)
        best = better


def _rate(step: int) -> float:
    """Two steps a decade: 1e-3 is step -6, 3e-3 is step -5."""
    return float(f"{(1, 3)[step % 2]}e{step // 2}")


class _Stopwatch(L.Callback):
    """Processor seconds of each training step: forward, backward and the optimizer's, without loading the batch.

    Processor time, not the wall's, so that other work on the machine counts little.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the tables that each run prints; collect the last run's garbage first."""
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
