"""Store each run as a line of JSON, so that an interrupted study can continue."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """The key of a run; a run whose setting is in the store is not repeated.

    Attributes:
        study: the name of the study.
        method: the callback as source code, or "base".
        lr: the peak learning rate.
        steps: the number of optimizer steps.
        seed: the seed of all random numbers.
        tuning: whether the scores are from the data held out to choose the rate, instead of the test data.
    """

    study: str
    method: str
    lr: float
    steps: int
    seed: int
    tuning: bool


@dataclass
class Result:
    """The result of one run. The study defines ``scores`` and ``samples``; ``checkpoint`` is in bytes."""

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
    """The results in a file of JSON lines; without a path, in memory only.

    It also reads results that other processes add, so that several processes can share a study's rows.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._results: dict[Setting, Result] = {}

    def all(self) -> dict[Setting, Result]:
        """All runs."""
        if self.path is not None and self.path.exists():
            self._results = {result.setting: result for result in map(_read, self.path.read_text().splitlines())}
        return self._results

    def get(self, setting: Setting) -> Result | None:
        """The run with this setting; None if there is none."""
        return self.all().get(setting)

    def add(self, result: Result) -> None:
        """Store a result, and write it to disk at once."""
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
