"""Compare LoRA and QLoRA: adapt a pretrained language model to another text, on its float base and on quantised ones.

    python -m benchmarks.quantised path/to/stories260K path/to/text.txt --markdown benchmarks/results/quantised.md

The table has the loss (nats per token) on the last tenth of the text before and after training, averaged over the
seeds with the standard deviation, and the bytes of the quantised layers. Every run has the same batches, learning rate
and initial adapters.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.targeting.packed import is_packed, size_in_bytes

BASES: dict[str, Any] = {
    "float32": None,
    "nf4": lambda: lp.QuantizeBase("nf4"),
    "nf4, scales in float32": lambda: lp.QuantizeBase("nf4", options={"compress_statistics": False}),
    "int8 (bitsandbytes)": lambda: lp.QuantizeBase("int8"),
    "int8 (torchao)": lambda: lp.QuantizeBase("int8", backend="torchao"),
    "float8 (torchao)": lambda: lp.QuantizeBase("float8"),
}


def batches(tokens: Tensor, size: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random windows (size, length) of ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (size,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts])


@torch.no_grad()
def loss_on(model: Any, tokens: Tensor, length: int) -> float:
    """The mean loss per token over all windows of ``tokens``."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in windows.split(32)]
    return float(sum(losses)) / len(windows)


def run(
    folder: Path, tokens: Tensor, base: Any, seed: int, steps: int, length: int = 128
) -> tuple[float, float, int, int]:
    """Train once; return the loss before and after, the bytes of the linear layers, and the trained parameters."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    cut = len(tokens) * 9 // 10
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    report = lp.apply(model, *([base()] if base is not None else []), lp.LoRA(r=8, seed=seed))
    size = sum(size_in_bytes(m) if is_packed(m) else m.weight.nbytes for m in linear)
    before = loss_on(model, tokens[cut:], length)
    optimizer = torch.optim.AdamW(lp.trainable_parameters(model), lr=2e-3)
    for batch in batches(tokens[:cut], 16, length, steps, seed):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, loss_on(model, tokens[cut:], length), size, report.trainable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder with a causal language model and its tokenizer")
    parser.add_argument("text", type=Path, help="a text file; the last tenth is held out")
    parser.add_argument("--characters", type=int, default=400_000, help="number of characters of the text to use")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of 16 x 128 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs for each base")
    parser.add_argument("--bases", nargs="*", default=[*BASES], choices=[*BASES], help="which bases to compare")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model, local_files_only=True)
    text = given.text.read_text(errors="ignore")[: given.characters]
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    lines = ["| base | bytes of the layers | loss before | after | standard deviation |", "|---|---|---|---|---|"]
    for name in given.bases:
        found = [run(given.model, tokens, BASES[name], seed, given.steps) for seed in range(given.seeds)]
        after = [loss for _, loss, _, _ in found]
        spread = statistics.stdev(after) if len(after) > 1 else 0.0
        before, _, size, trained = found[0]
        lines.append(f"| {name} | {size:,} | {before:.4f} | {statistics.mean(after):.4f} | {spread:.4f} |")
        print(lines[-1], flush=True)
    where = f"{given.model.name} on {len(tokens):,} tokens of {given.text.parent.name}"
    title = f"LoRA r=8 ({trained:,} parameters) on {where}: {given.steps} steps, {given.seeds} seeds"
    page = "\n".join([f"# {title}", "", *lines, ""])
    print(page)
    if given.markdown is not None:
        given.markdown.write_text(page)


if __name__ == "__main__":
    main()
