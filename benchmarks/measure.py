"""Measure the step time and saved activations of a model, and describe the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.methods import Hooks


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for its backward.

    Attributes:
        activations: bytes of distinct storages that are neither parameters, buffers nor the batch.
        batch: bytes of storages of the input batch that are kept.
    """

    activations: int = 0
    batch: int = 0


class _Held:
    """Takes the place of a saved tensor in the graph, and is freed with it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module | None = None, batch: Iterable[Tensor] = ()) -> Saved:
    """Count the bytes that ``forward`` leaves saved for backward when it returns.

    Each distinct storage counts once and in full, even if several tensors view it, because a view keeps all of its
    storage alive. Storages of ``model``'s parameters and buffers do not count. Tensors that a custom autograd function
    keeps as attributes of its context, where hooks do not see them, are found by walking the graph.

    Args:
        forward: runs the model and returns the loss.
        model: the model; its parameters and buffers do not count.
        batch: the input tensors, which are counted separately.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        # A detached alias, because a node that saves its own output would otherwise form a reference cycle.
        item = _Held(tensor.detach())
        held.add(item)
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        loss = forward()
    tensors = [item.tensor for item in held]
    tensors += [t for node in graph_nodes(loss) for t in vars(node).values() if isinstance(t, Tensor)]

    owned = storages([*model.parameters(), *model.buffers()]) if model is not None else {}
    inputs = storages(batch)
    kept = {key: size for key, size in storages(tensors).items() if key not in owned}
    total = sum(kept.values())
    of_batch = sum(size for key, size in kept.items() if key in inputs)
    return Saved(total - of_batch, of_batch)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map each distinct non-empty storage to its size in bytes."""
    found = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in found if s.nbytes()}


def graph_nodes(output: Tensor) -> Iterator[object]:
    """Yield the nodes of the autograd graph of ``output`` that are defined in Python; only these have attributes."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
        if hasattr(node, "__dict__"):
            yield node


def train_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    autocast: bool,
    hooks: Hooks,
    clock: str = "wall",
) -> float:
    """Run forward, backward and the optimizer's step; return the seconds it took by ``"wall"`` or ``"cpu"`` time."""
    device = next(model.parameters()).device
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    _synchronize(device)
    start = now()
    hooks.begin()
    loss = forward_loss(model, batch, autocast)
    loss.backward()
    hooks.gradients()
    if optimizer is not None:
        optimizer.step()
        hooks.stepped()
        optimizer.zero_grad()
    _synchronize(device)
    return now() - start


def forward_loss(model: nn.Module, batch: dict[str, Tensor], autocast: bool) -> Tensor:
    """The loss of one batch; with ``autocast``, under bfloat16 autocast."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return model(**batch).loss


def peak_cuda_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak CUDA memory of ``step`` minus the memory allocated before it; ``None`` on other devices."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Spread:
    """Median, minimum and quartiles of repeated measurements."""

    median: float
    min: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), min(values), low, high)


def paired_ratio(times: list[float], reference: list[float]) -> Spread:
    """The ratio for each repetition, so that slow moments of the machine cancel out."""
    return Spread.of([a / b for a, b in zip(times, reference, strict=True)])


def add_run_options(parser: argparse.ArgumentParser, repeats: int, page: str = "the table") -> None:
    """Add the options that all benchmarks have: threads, clock, repetitions, and the page to write."""
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: measure this process's CPU time")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--markdown", type=Path, help=f"write {page} to this file")


def parse_line(parser: argparse.ArgumentParser, line: list[str] | None) -> argparse.Namespace:
    """Parse the options, and add the arguments as ``line``. None reads the command line."""
    args = parser.parse_args(line)
    args.line = sys.argv[1:] if line is None else line
    return args


def hardware(device: str) -> str:
    """The processor, its cores, the threads in use, and the accelerator's name."""
    cpu = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, threads: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()} ({cpu})" if device == "cuda" else cpu


def versions() -> dict[str, str]:
    """Versions of the measured packages and of Python and torch."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "peft", "lightning_peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "checkout" if package == "lightning_peft" else "absent"
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
