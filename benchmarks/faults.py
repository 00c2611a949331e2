"""Kill training runs at random moments, resume each, and compare it bit for bit with a run that was never stopped.

    python -m benchmarks.faults --kills 10 --markdown benchmarks/results/faults.md

Every row of ``tests/table.py`` trains a small model for three epochs and saves after every step. A signal ends its
process, so that no more Python code runs:

- ``time``: SIGKILL from outside, after a random time.
- ``file``: SIGKILL at a random operation (open, rename, remove) of the process on files of the run's folder.
- ``write``: in the middle of a write, after a random number of bytes (SIGXFSZ, the limit of a file's size).

The next process resumes from ``last.ckpt``, and may be killed again. It must find every step that was saved before the
kill, and end with the weights, optimizer, scheduler and step of the run that was never stopped. Processes are forked
from one that has imported everything, so a kill costs about a second.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_peft.core.state.digest import tensor_digests, value_digest
from tests.holes import REFUSED
from tests.kinds import KINDS, Kind
from tests.table import METHODS

HOW = ("time", "file", "write")
ON = ("linear", "vit", "encoder", "llama")  #: each method trains on the first of these models that it supports
LIMIT = 120  #: maximum seconds for one process


class Batches(Dataset):
    """Random batches for a kind of model."""

    def __init__(self, kind: Kind, length: int = 4) -> None:
        self.batches = [kind.batch(seed) for seed in range(length)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.batches[index]


def _first(batches: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return batches[0]


class Module(L.LightningModule):
    """A model of ``tests/kinds.py`` that learns to output ones, with dropout on its output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = KINDS[kind].build(), kind

    def forward(self, *batch: Tensor) -> Tensor:
        """The network's output."""
        return self.net(*batch)

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        """The loss, which depends on torch's random numbers."""
        output = nn.functional.dropout(self(*batch), 0.1)
        return nn.functional.mse_loss(output, torch.ones_like(output))

    def validation_step(self, batch: tuple[Tensor, ...], index: int) -> None:
        """Logs the loss that the best checkpoints are chosen by."""
        self.log("val_loss", self.training_step(batch, index), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        """One batch."""
        return DataLoader(Batches(KINDS[self.kind], 1), batch_size=1, collate_fn=_first)

    def train_dataloader(self) -> DataLoader:
        """Batches in random order."""
        return DataLoader(Batches(KINDS[self.kind]), batch_size=1, shuffle=True, collate_fn=_first)

    def configure_optimizers(self) -> Any:
        """AdamW, whose learning rate changes in every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def inside_net(kind: Kind) -> Kind:
    """``kind`` with the names that its weights have in :class:`Module`."""
    return replace(kind, matrices={f"net.{name}": shape for name, shape in kind.matrices.items()})


class Progress(Callback):
    """Records each step that was saved, and checks on resume that none of them is lost."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "saved_steps"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the resumed step with the last one that was saved."""
        if self.file.exists() and trainer.global_step < (saved := len(self.file.read_bytes())):
            raise RuntimeError(f"step {saved} was saved, but the run resumes at step {trainer.global_step}")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Add a byte to the file for each new step, since the checkpoint of the previous step is now complete."""
        missing = trainer.global_step - (len(self.file.read_bytes()) if self.file.exists() else 0)
        with self.file.open("ab", buffering=0) as file:
            file.write(b"." * max(missing, 0))


def train(folder: Path, row: str, kind: str) -> dict[str, str]:
    """Train, or resume if there is a checkpoint; return digests of the state at the end."""
    warnings.simplefilter("ignore")
    last = folder / "last.ckpt"
    L.seed_everything(3 if not last.exists() else 99, verbose=False)
    options: dict[str, Any] = {"save_last": True, "enable_version_counter": False}
    saves = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, **options),
        ModelCheckpoint(folder / "best", "{epoch}", monitor="val_loss", save_top_k=2, **options),
    ]
    module = Module(kind)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[METHODS[row].make(inside_net(KINDS[kind]), audit="warn"), Progress(folder), *saves],
    )
    trainer.fit(module, ckpt_path=last if last.exists() else None)
    state = {"step": trainer.global_step, "weights": module.state_dict()}
    state |= {"optimizer": trainer.optimizers[0].state_dict()}
    state |= {"scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict()}
    return dict(_digests("", state))


def _digests(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [found for key, inside in value.items() for found in _digests(f"{name}.{key}", inside)]
    return [*tensor_digests({name: value}).items()] if isinstance(value, Tensor) else [(name, value_digest(value))]


def in_child(
    folder: Path, work: Callable[[], Any], prepare: Callable[[], None] = lambda: None, after: float = 0
) -> int:
    """Run ``work`` in a forked process, and write what it returns to ``result.json``.

    Args:
        folder: the folder for the result, and for the traceback of an error.
        work: the function to run.
        prepare: called first in the process.
        after: kill the process after this many seconds; with 0, after :data:`LIMIT`, which counts as an error.

    Returns:
        The status: 0, the exit code of an error, or the negative number of the signal that ended the process.
    """
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            prepare()
            result = work()
            (folder / "result.json").write_text(json.dumps(result))
            os._exit(0)
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
            os._exit(1)
    end = time.monotonic() + (after or LIMIT)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            if not after:
                (folder / "error").write_text(f"no end after {LIMIT} s")
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_file_operation(folder: Path, number: int, then: Callable[[], None], count: list[int] | None = None) -> None:
    """Call ``then`` before this process's ``number``-th operation (open, rename, remove) on a file of ``folder``."""
    seen = count if count is not None else [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove") or not str(arguments[0]).startswith(str(folder)):
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            seen[0] += 1
            if seen[0] == number:
                then()

    sys.addaudithook(watch)


def kill_here() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def limit_writes(size: int) -> None:
    """End this process when it writes more than ``size`` bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@dataclass
class Row:
    """The outcomes of one method's runs.

    Attributes:
        name: the row of ``tests/table.py``.
        kind: the model that it trained.
        kills: number of kills of each kind.
        runs: number of runs that were killed at least once, resumed and compared.
        bad: a description of each process that failed and each run that differed.
    """

    name: str
    kind: str
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: int = 0
    bad: list[str] = field(default_factory=list)

    def measure(self, root: Path, kills: int, draw: random.Random) -> None:
        """Train once without interruption, then kill and resume runs until there were ``kills`` kills."""
        whole = root / "whole"
        whole.mkdir()
        count = [0]

        def work() -> Any:
            begin = time.monotonic()
            return train(whole, self.name, self.kind), time.monotonic() - begin, count[0]

        if in_child(whole, work, lambda: at_file_operation(whole, -1, kill_here, count)):
            self.bad.append(f"the uninterrupted run failed: {(whole / 'error').read_text()[-2000:]}")
            return
        expected, duration, operations = json.loads((whole / "result.json").read_text())
        size = (whole / "last.ckpt").stat().st_size
        while sum(self.kills.values()) < kills and not self.bad:
            folder = Path(tempfile.mkdtemp(dir=root))
            prepare = functools.partial(_prepare, folder, draw, duration, operations, size)
            self._chain(folder, expected, kills, prepare)

    def _chain(self, folder: Path, expected: Any, kills: int, prepare: Callable[[], Any]) -> None:
        """Kill one run repeatedly until it ends or no kills are left; then compare its result."""
        killed = 0
        while True:
            how, first, after = prepare() if sum(self.kills.values()) < kills else ("", lambda: None, 0)
            status = in_child(folder, lambda: train(folder, self.name, self.kind), first, after)
            if status < 0 and how:
                self.kills[how] += 1
                killed += 1
                continue
            if status:
                self.bad.append((folder / "error").read_text()[-2000:])
            elif killed:
                found = json.loads((folder / "result.json").read_text())
                if apart := [key for key in {**expected, **found} if expected.get(key) != found.get(key)]:
                    self.bad.append(f"{folder.name}: {', '.join(apart[:5])} differ after {killed} kills")
            self.runs += bool(killed)
            return


def _prepare(
    folder: Path, draw: random.Random, duration: float, operations: int, size: int
) -> tuple[str, Callable[[], None], float]:
    """Choose how to end the next process: the kind, a function to call in it first, and when to kill it."""
    how = draw.choice(HOW)
    if how == "time":
        return how, lambda: None, draw.uniform(0.01, duration)
    number, most = draw.randint(1, operations), draw.randint(0, size)
    end = kill_here if how == "file" else lambda: limit_writes(most)
    return how, lambda: at_file_operation(folder, number, end), 0


def kind_of(row: str) -> str:
    """The model that a row of the table is trained on."""
    return next(kind for kind in ON if (row, kind) not in REFUSED and kind in METHODS[row].kinds)


def table(rows: list[Row]) -> str:
    """The page of results."""
    total = collections.Counter[str]()
    for row in rows:
        total += row.kills
    lines = [
        "# Runs that were killed and resumed",
        "",
        "`python -m benchmarks.faults` (see its docstring) wrote this page. A signal ended a process at a random time,",
        "at a random file operation of a save, or in the middle of a write; the next one resumed from `last.ckpt`.",
        "",
        f"{sum(total.values()):,} kills ({', '.join(f'{total[how]:,} {how}' for how in HOW)}) of "
        f"{sum(row.runs for row in rows):,} runs; {sum(len(row.bad) for row in rows):,} bad outcomes. Every run ended",
        "with the weights, optimizer, scheduler and step of a run that was never stopped, bit for bit (CPU, torch",
        f"{torch.__version__.partition('+')[0]}, Lightning {L.__version__}), and no saved step was lost.",
        "",
        f"| method | model | kills: {' | '.join(HOW)} | runs | bad |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| `{row.name}` | {row.kind} | {' | '.join(str(row.kills[how]) for how in HOW)} | {row.runs} | "
            f"{len(row.bad)} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print a line for each method; exit with 1 if a run could not be resumed or ended differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of kills of each method")
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS), help="rows of tests/table.py")
    parser.add_argument("--seed", type=int, default=0, help="seed for the random moments")
    parser.add_argument("--markdown", type=Path, help="write the page of results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for name in options.method:
        row = Row(name, kind_of(name))
        with tempfile.TemporaryDirectory() as root:
            row.measure(Path(root).resolve(), options.kills, random.Random(f"{name}{options.seed}"))
        rows.append(row)
        said = ", ".join(f"{row.kills[how]} {how}" for how in HOW)
        print(f"{name} on {row.kind}: {said}; {row.runs} runs, {len(row.bad)} bad", *row.bad, sep="\n", flush=True)
        if options.markdown:
            options.markdown.write_text(table(rows))
    raise SystemExit(any(row.bad for row in rows))


if __name__ == "__main__":
    main()
