"""Time a forward pass with many adapters in one batch, with one adapter for all rows, and with PEFT.

All variants run in one process and take turns, so that slow moments of the machine affect all; compare the ratios.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_peft as lp
from benchmarks.measure import Spread, add_run_options, hardware, paired_ratio, parse_line, versions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(args: argparse.Namespace) -> nn.Module:
    """A random decoder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=8 * args.hidden // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64 or 1,
        num_key_value_heads=args.hidden // 64 or 1,
    )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def names_of(args: argparse.Namespace) -> list[str]:
    """The adapter of each row, from ``args.adapters`` adapters in turn."""
    return [f"a{i % args.adapters}" for i in range(args.rows)]


def ours(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The base with the adapters of this library."""
    model = copy.deepcopy(base)
    lp.apply(model, *(lp.LoRA(r=args.rank, targets=TARGETS, name=name) for name in dict.fromkeys(names_of(args))))
    return moved(model)


def peft(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The base with the adapters of PEFT."""
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        return LoraConfig(r=args.rank, lora_alpha=16, target_modules=TARGETS)

    first, *others = dict.fromkeys(names_of(args))
    model = get_peft_model(copy.deepcopy(base), config(), adapter_name=first)
    for name in others:
        model.add_adapter(name, config())
    return moved(model)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Set the model's adapters to random values, and move it to the device of the others."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02)
    return model.to(next(model.parameters()).device).eval()


def variants(args: argparse.Namespace) -> dict[str, tuple[Callable[[], AbstractContextManager], Callable[[], Any]]]:
    """For each variant: the context, which is entered once per repetition, and a forward pass."""
    base, ids = llama(args), torch.randint(0, 1024, (args.rows, args.length), device=args.device)
    names = names_of(args)
    half = [name if i % 2 else None for i, name in enumerate(names)]
    mine = ours(base, args)

    def forward(model: nn.Module, **options: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=ids, use_cache=False, **options).logits

    found: dict[str, tuple[Callable[[], AbstractContextManager], Callable[[], Any]]] = {
        "base": (nullcontext, forward(base)),
        "ours, one adapter": (lambda: lp.active(mine, names[0]), forward(mine)),
        f"ours, {args.adapters} adapters": (lambda: lp.rows(mine, names), forward(mine)),
        "ours, every second row none": (lambda: lp.rows(mine, half), forward(mine)),
    }
    try:
        theirs: Any = peft(base, args)
    except ImportError:
        return found
    return found | {
        "peft, one adapter": (nullcontext, forward(theirs)),
        f"peft, {args.adapters} adapters": (nullcontext, forward(theirs, adapter_names=names)),
    }


@contextmanager
def timed(device: str, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Yield a list, and append the seconds that the block took."""
    seconds: list[float] = []
    _synchronize(device)
    start = clock()
    yield seconds
    _synchronize(device)
    seconds.append(clock() - start)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """For each repetition, the seconds for ``args.steps`` forward passes in one context, including entering it."""
    runs, clock = variants(args), {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(args.warmup + args.repeats):
        order = list(runs)[repetition % len(runs) :] + list(runs)[: repetition % len(runs)]
        for name in order:
            context, forward = runs[name]
            with timed(args.device, clock) as seconds, context():
                for _ in range(args.steps):
                    forward()
            if repetition >= args.warmup:
                times[name] += seconds
    return times


def rows_of(times: dict[str, list[float]]) -> list[tuple[str, str, str, str]]:
    """Name, milliseconds, and the ratios to one adapter of this library and to one of PEFT."""
    found = []
    for name, seconds in times.items():
        ratios = [paired_ratio(seconds, times[one]) if one in times else None for one in REFERENCES]
        shown = ["" if r is None else f"{r.median:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios]
        found.append((name, f"{1000 * Spread.of(seconds).median:.1f}", *shown))
    return found  # type: ignore[return-value]


REFERENCES = ("ours, one adapter", "peft, one adapter")
COLUMNS = ("variant", "ms", "/ ours, one adapter", "/ peft, one adapter")


def markdown(times: dict[str, list[float]], args: argparse.Namespace) -> str:
    """The page: the table, the command and the hardware."""
    lines = ["# Many adapters in one batch", "", f"`python -m benchmarks.rows {' '.join(args.line)}`", ""]
    lines += [f"{hardware(args.device)}; {', '.join(f'{k} {v}' for k, v in versions().items())}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows_of(times)]
    return "\n".join(lines) + "\n"


def parse(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16, help="number of adapters, assigned to the rows in turn")
    parser.add_argument("--length", type=int, default=128, help="tokens per row; 1 is a decoding step")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1, help="forward passes per context")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_run_options(parser, repeats=10)
    parser.add_argument("--warmup", type=int, default=1)
    return parse_line(parser, line)


def main(line: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = parse(line)
    if args.threads:
        torch.set_num_threads(args.threads)
    times = measure(args)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(hardware(args.device), versions(), highlight=False)
    table = Table(*COLUMNS)
    for row in rows_of(times):
        table.add_row(*row)
    console.print(table)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(times, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
