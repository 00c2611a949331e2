"""Measure training steps with and without ``CacheFrozen``, and compare the trained parameters.

The model has MiniLM's shape (6 layers of width 384) and random weights. Fits with and without the cache alternate. Only
epochs in which all rows are stored count, except for the one step per epoch in which results are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

import lightning_peft as lp
from benchmarks.measure import hardware, versions
from tests.methods.fitting import fitted

LAYERS, TOKENS, BATCH, STEPS, EPOCHS = 6, 128, 16, 6, 3


def lora(last: int) -> lp.LoRA:
    """LoRA in the last layers alone."""
    layers = "|".join(str(LAYERS - 1 - i) for i in range(last))
    return lp.LoRA(r=8, targets=[rf"re:.*layer\.({layers})\..*(query|value)"], trainable=["head"])


METHODS: dict[str, Callable[[], L.Callback]] = {
    "LinearProbe": lp.LinearProbe,
    "LastLayers(1)": lambda: lp.LastLayers(1),
    "LoRA in the last layer": lambda: lora(1),
    "LoRA in the last 2 of 6": lambda: lora(2),
    "LoRA in the last 4 of 6": lambda: lora(4),
}


class Classifier(L.LightningModule):
    """An encoder and a head, from a fixed seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000,
            hidden_size=384,
            num_hidden_layers=LAYERS,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        self.encoder = BertModel(config, add_pooling_layer=False).eval()
        self.head = nn.Linear(384, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        return nn.functional.cross_entropy(self.head(self.encoder(tokens).last_hidden_state[:, 0]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Timer(L.Callback):
    """CPU time of each step, by epoch."""

    def __init__(self) -> None:
        self.steps: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.process_time()
        if trainer.current_epoch and trainer.fit_loop.epoch_loop.batch_idx >= 2:
            self.steps.setdefault(trainer.current_epoch, []).append(now - self._last)
        self._last = now


def fit(make: Callable[[], L.Callback], folder: Path | None) -> tuple[list[float], dict[str, Tensor]]:
    """Train. Returns the times of the steps and the trained parameters."""
    model, timer = Classifier(), Timer()
    generator = torch.Generator().manual_seed(1)
    rows = STEPS * BATCH
    data = TensorDataset(torch.randint(0, 1000, (rows, TOKENS), generator=generator), torch.arange(rows) % 4)
    callbacks = [make(), timer] if folder is None else [make(), timer, lp.CacheFrozen(folder)]
    fitted(model, callbacks, EPOCHS, DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(2)))
    return [s for steps in timer.steps.values() for s in steps], {
        name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
    }


def main() -> None:
    """Run all methods, and write a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2, help="fits of each kind; default: %(default)s")
    parser.add_argument("--markdown", type=Path, help="the page to write")
    args = parser.parse_args()
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    page = [
        "# CacheFrozen\n",
        f"`python -m benchmarks.frozen_cache`; {hardware('cpu')}; {packages}. An encoder of MiniLM's shape with random "
        f"weights, {BATCH} rows of {TOKENS} tokens. CPU time of a step, median; both kinds of fit alternate.\n",
        "| method | plain, ms | cached, ms | ratio | bytes per row | trained values |",
        "|---|---|---|---|---|---|",
    ]
    for name, make in track(METHODS.items(), "methods"):
        plain: list[float] = []
        cached: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.repeats):
                steps, values = fit(make, None)
                plain += steps
                steps, same = fit(make, Path(folder))
                cached += steps
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / (STEPS * BATCH)
        equal = all(torch.equal(values[key], same[key]) for key in values)
        before, after = statistics.median(plain) * 1000, statistics.median(cached) * 1000
        bits = "equal, bit for bit" if equal else "DIFFERENT"
        page.append(f"| {name} | {before:.0f} | {after:.1f} | {after / before:.2f} | {size:,.0f} | {bits} |")
    Console().print("\n".join(page))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
