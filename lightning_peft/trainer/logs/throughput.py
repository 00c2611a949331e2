"""Measure how fast a fit runs, and its peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.trainer.logs import keys

__all__ = ["Throughput", "peak_memory", "samples_in"]


def samples_in(batch: Any) -> int | None:
    """The number of samples in a batch: the first size of its first tensor; None if it has no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for part in parts if (size := samples_in(part)) is not None), None)


class Throughput:
    """Counts samples, tokens and time between two calls of :meth:`take`.

    The first batch of a fit does not count, because it compiles kernels and fills caches; neither does validation.

    Args:
        batch_size_fn: returns the number of samples of a batch; None is :func:`samples_in`.
    """

    def __init__(self, batch_size_fn: Callable[[Any], int] | None = None) -> None:
        self.batch_size_fn = batch_size_fn or samples_in
        self._since: float | None = None
        self._restart()

    def _restart(self) -> None:
        self.seconds, self.steps, self.samples = 0.0, 0, 0
        self.known = True  # whether the samples of every batch could be counted
        self._tokens: Tensor | int | None = None

    def resume(self) -> None:
        """Start the clock, before a training batch is loaded."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    def count(self, batch: Any, stepped: bool) -> None:
        """Count a batch that has just ended, and whether an optimizer step was part of it."""
        if self._since is None:
            self.resume()
            return
        samples = self.batch_size_fn(batch)
        self.known &= samples is not None
        self.samples += samples or 0
        self.steps += stepped
        if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), Tensor):
            mask = batch.get("attention_mask")
            # Summed on the device and read only when it is logged, so that no step waits for a GPU.
            now = mask.sum() if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
            self._tokens = now if self._tokens is None else self._tokens + now

    def take(self, processes: int) -> dict[str, float]:
        """Return the values since the last call, and start counting again.

        Args:
            processes: the number of processes that train on different samples.
        """
        if self._since is None or not self.steps:
            return {}
        self.pause()
        rate = processes / self.seconds
        values = {keys.STEP_TIME.name: self.seconds / self.steps}
        if self.known:
            values[keys.SAMPLES.name] = self.samples * rate
        if self._tokens is not None:
            values[keys.TOKENS.name] = float(self._tokens) * rate
        self._restart()
        self.resume()
        return values


def peak_memory(device: torch.device) -> float | None:
    """The peak memory in bytes, of the tensors on a CUDA device or of the process on the CPU; None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)  # Linux counts in kB
