"""Store each run as a line of JSON, so that an interrupted study can continue."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What tells one run from another: a run whose setting is in the store is not made again.

    Attributes:
        study: its name.
        method: the callback as one writes it, or "base".
        lr: the peak learning rate.
        steps: of the optimizer.
        seed: of everything random.
        tuning: the scores are of data held out for choosing the rate, not of the test data.
    """

    study: str
    method: str
    lr: float
    steps: int
    seed: int
    tuning: bool


@dataclass
class Result:
    """What one run gave. ``scores`` and ``samples`` are the study's; ``checkpoint`` is in bytes."""

    setting: Setting
    trainable: int
    total: int
    step_ms: float | None
    checkpoint: int
    scores: dict[str, float]
    samples: list[str]
    seconds: float

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


class Store:
    """The results in a file of JSON lines; in memory only where there is no path.

    It reads what other processes add meanwhile, so that several may share the rows of a study.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._results: dict[Setting, Result] = {}

    def all(self) -> dict[Setting, Result]:
        """Every run that was made."""
        if self.path is not None and self.path.exists():
            self._results = {result.setting: result for result in map(_read, self.path.read_text().splitlines())}
        return self._results

    def get(self, setting: Setting) -> Result | None:
        """The run with this setting, if it was made."""
        return self.all().get(setting)

    def add(self, result: Result) -> None:
        """Keep it, on disk at once."""
        self._results[result.setting] = result
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")

    def tried(self, study: str, method: str) -> list[Result]:
        """The runs of a method's search for its rate, in the order of the rates."""
        found = [r for s, r in self.all().items() if s.tuning and (s.study, s.method) == (study, method)]
        return sorted(found, key=lambda result: result.setting.lr)


def _read(line: str) -> Result:
    values: dict[str, Any] = json.loads(line)
    return Result(**{**values, "setting": Setting(**values["setting"])})
