"""Time, memory and checkpoint size of a run, without what the run prints."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch

from lightning_peft.trainer.logs.throughput import peak_memory as peak_since_start

__all__ = ["checkpoint_size", "clock", "peak_memory", "quiet", "reset_peak"]

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "transformers")


def clock(device: torch.device) -> float:
    """Processor time on a CPU, so that other work on the machine counts little; wall time on other devices."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Start to measure the highest memory use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The highest memory use since :func:`reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return int(peak_since_start(torch.device("cpu")) or 0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what each run prints: tables, progress bars, warnings and messages."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with out, err, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def checkpoint_size(trainer: L.Trainer) -> int:
    """The size of a checkpoint of what trains, in bytes."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "trained.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
