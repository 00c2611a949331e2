"""Keep the results of a comparison on disk, so that it continues after a kill and several processes share the work."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import attrs

from lightning_peft.core.state.atomic_file import new_file
from lightning_peft.pretrained import InputError

__all__ = ["Failure", "Part", "Result", "Store"]


@attrs.frozen
class Result:
    """The measurements of one run.

    Attributes:
        label: the candidate's label.
        method: the method's class name.
        fraction: the part of the training data.
        seed: the seed of everything random.
        metric: the value of the compared metric.
        trainable: number of trainable parameters.
        total: number of all parameters.
        step_ms: median time of a training step: processor time on a CPU, wall time on a GPU.
        peak_mb: highest memory use during training: of the process on a CPU, of the allocator on a GPU.
        checkpoint_mb: size of a checkpoint with the trainable state only.
        forgetting_loss: increase of the loss on the retention data; None without such data or without labels.
        divergence: from the base on the retention data, a KL divergence in nats or a cosine distance; None without such
            data.
        minutes: wall time of the training, without validation.
        values: the searched values, the learning rate included.
        flags: the arguments of ``lightning-peft fit`` that select the method and its values.
        metrics: every metric that the module logged in the evaluation.
        losses: pairs of a step and the mean training loss around it.
        curve: pairs of a step and the validation metric then.
        scales: for each factor of ``lp.scale`` the metric and the divergence; empty if not measured.
    """

    label: str
    method: str
    fraction: float
    seed: int
    metric: float
    trainable: int
    total: int
    step_ms: float
    peak_mb: float
    checkpoint_mb: float
    forgetting_loss: float | None
    divergence: float | None
    minutes: float
    values: Mapping[str, Any]
    flags: list[str]
    metrics: Mapping[str, float]
    losses: list[tuple[int, float]] = attrs.field(factory=list)
    curve: list[tuple[int, float]] = attrs.field(factory=list)
    scales: list[tuple[float, float, float]] = attrs.field(factory=list)


@attrs.frozen
class Part:
    """The first steps of a run, from which it may continue.

    Attributes:
        label: the candidate's label.
        fraction: the part of the training data.
        steps: the optimizer steps so far.
        metric: the metric of the search on validation data, with the trainable parameters averaged over the last
            quarter of the steps; NaN if the loss is not finite.
        minutes: wall time of the training so far, without validation.
        values: the searched values, the learning rate included.
    """

    label: str
    fraction: float
    steps: int
    metric: float
    minutes: float
    values: Mapping[str, Any]


@attrs.frozen
class Failure:
    """A candidate that could not run. ``reason`` is the error's first line."""

    label: str
    method: str
    fraction: float
    reason: str


_KINDS: dict[str, type[Any]] = {"result": Result, "failure": Failure, "part": Part}


class Store:
    """The folder of a comparison.

    Args:
        folder: created if needed.
        settings: what all runs have in common; a folder made with other settings is refused.

    Raises:
        InputError: if the folder holds another comparison.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        for part in ("runs", "locks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        said = folder / "comparison.json"
        with self.claim("settings", wait=True):
            if said.is_file():
                before = json.loads(said.read_text())
                changed = sorted(name for name in before | {**settings} if before.get(name) != settings.get(name))
                if changed:
                    raise InputError(
                        f"{folder} holds a comparison with another value of {', '.join(changed)}, so its results are "
                        "not comparable: choose another --output, or delete the folder"
                    )
            else:
                _write(said, settings)

    @property
    def journal(self) -> Path:
        """The file that holds the searches, in Optuna's journal format."""
        return self.folder / "optuna.log"

    @contextlib.contextmanager
    def claim(self, unit: str, wait: bool = False) -> Iterator[bool]:
        """Hold a piece of work, so that no other process does it; yields False if another process holds it.

        The operating system releases the lock of a process that is killed.
        """
        with (self.folder / "locks" / f"{unit}.lock").open("w") as file:
            held = _lock(file, wait)
            yield held

    def state(self, unit: str) -> Path:
        """The checkpoint from which the run of a :class:`Part` continues."""
        return self.folder / "states" / f"{unit}.ckpt"

    def get(self, unit: str) -> Result | Failure | Part | dict[str, Any] | None:
        """The stored outcome of a piece of work; None if it is not done."""
        path = self.folder / "runs" / f"{unit}.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        kind = found.pop("kind")
        made = _KINDS.get(kind)
        return found if made is None else made(**found)

    def put(self, unit: str, outcome: Result | Failure | Part | Mapping[str, Any]) -> None:
        """Store the outcome of a piece of work, completely or not at all."""
        kind = next((name for name, made in _KINDS.items() if type(outcome) is made), "other")
        value = dict(outcome) if isinstance(outcome, Mapping) else attrs.asdict(outcome)
        _write(self.folder / "runs" / f"{unit}.json", {"kind": kind, **value})

    def forget_failures(self) -> None:
        """Remove the stored failures, so that their candidates are tried again."""
        for path in (self.folder / "runs").glob("*.json"):
            if json.loads(path.read_text()).get("kind") == "failure":
                path.unlink()


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with new_file(path) as made:
        made.write_text(json.dumps(value, indent=1))


def _lock(file: IO[str], wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
