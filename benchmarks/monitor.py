"""Measure what AdapterMonitor's norms and ranks cost in a training step: ``python -m benchmarks.monitor``.

A random decoder with LoRA in all linear layers. CPU time of the process, so that other processes do not change it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.trainer.logs.norms import Norms, Updates


def main() -> None:
    """Print the time of a step, of each part of the measurement, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"width": 384, "layers": 12, "rank": 8, "rows": 8, "tokens": 128, "repeats": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=given.width,
        intermediate_size=8 * given.width // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
    )
    model = LlamaForCausalLM(config).train()
    lp.apply(model, lp.LoRA(r=given.rank))
    optimizer = torch.optim.AdamW(lp.trainable_parameters(model), lr=1e-3)
    ids = torch.randint(0, 2000, (given.rows, given.tokens))
    norms, updates = Norms(model), Updates(model)
    taken: dict[str, list[float]] = {}

    def timed(what: str, function: Callable[[], object]) -> None:
        start = time.process_time()
        function()
        taken.setdefault(what, []).append(time.process_time() - start)

    for _ in range(given.repeats + 2):
        timed("forward and backward", lambda: model(input_ids=ids, labels=ids).loss.backward())
        timed("norms before the step", lambda: norms.before_step(optimizer))
        timed("optimizer step", optimizer.step)
        timed("norms after the step", norms.after_steps)
        timed("updates and effective ranks", updates.measure)
        optimizer.zero_grad()
    medians = {what: statistics.median(times[2:]) for what, times in taken.items()}
    for what, seconds in medians.items():
        print(f"{what:28} {1e3 * seconds:8.1f} ms")
    step = medians["forward and backward"] + medians["optimizer step"]
    print(f"a step that measures / a step that does not: {sum(medians.values()) / step:.4f}")


if __name__ == "__main__":
    main()
