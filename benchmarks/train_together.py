"""Measure training steps of several adapters with ``TrainTogether``, compared with one adapter after another.

A random Llama with one LoRA of all linear layers for each adapter, and one row of tokens for each adapter and step. The
fits of both kinds alternate. The time of one after another is that of one adapter, times their number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from benchmarks.measure import hardware, versions
from tests.methods.fitting import fitted

#: steps of a fit; the first ones, in which outputs are compared and the audits run, do not count
STEPS, FIRST = 8, 3


class Language(L.LightningModule):
    """A language model from a fixed seed."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
        self.model = LlamaForCausalLM(config).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Timer(L.Callback):
    """CPU time of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.process_time()
        if trainer.fit_loop.epoch_loop.batch_idx >= FIRST:
            self.steps.append(now - self._last)
        self._last = now


def fit(args: argparse.Namespace, adapters: int, tokens: int) -> list[float]:
    """Train ``adapters`` adapters together, or a single one without the callback. Returns the times of the steps."""
    methods = [lp.LoRA(r=args.r, name=f"a{i}") for i in range(adapters)]
    timer = Timer()
    ids = torch.randint(0, 1000, (STEPS, tokens), generator=torch.Generator().manual_seed(1))
    together = [lp.TrainTogether()] if adapters > 1 else []
    model = Language(args.hidden, args.layers)
    fitted(model, [*methods, *together, timer], 1, DataLoader(TensorDataset(ids), 1))
    return timer.steps


def main() -> None:
    """Run all sizes, and write a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 8], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128, 512], help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2, help="fits of each kind; default: %(default)s")
    parser.add_argument("--markdown", type=Path, help="the page to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    page = [
        "# TrainTogether\n",
        f"`python -m benchmarks.train_together`; {hardware('cpu')}; {packages}. A Llama of {args.layers} layers of "
        f"width {args.hidden} with random weights, LoRA r={args.r} of all linear layers, one row of tokens for each "
        "adapter. CPU time of a step, median; both kinds of fit alternate.\n",
        "| adapters | tokens of each | one after another, ms | together, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for adapters, tokens in track([(k, t) for k in args.adapters for t in args.tokens], "sizes"):
        alone: list[float] = []
        together: list[float] = []
        for _ in range(args.repeats):
            alone += fit(args, 1, tokens)
            together += fit(args, adapters, tokens)
        before, after = statistics.median(alone) * 1000 * adapters, statistics.median(together) * 1000
        page.append(f"| {adapters} | {tokens} | {before:.0f} | {after:.0f} | {after / before:.2f} |")
    Console().print("\n".join(page))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
