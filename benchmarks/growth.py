"""Time operations while the number of adapters on one base grows, compared with Hugging Face PEFT."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_peft as lp
from benchmarks.measure import Spread, add_run_options, hardware, parse_line, versions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
OPERATIONS = ("load", "switch", "enter rows", "delete")


def llama(args: argparse.Namespace) -> nn.Module:
    """A small random Llama; the operations do not depend on the width of its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=args.layers, num_attention_heads=4)
    config.vocab_size = 128
    return LlamaForCausalLM(config).eval()


def ours(model: nn.Module, folder: Path) -> dict[str, Callable[[str], Any]]:
    """The operations in this library, by name."""

    def enter_rows(name: str) -> None:
        with lp.rows(model, [name, None]):
            pass

    return {
        "load": lambda name: lp.load_adapter(model, folder, name=name),
        "switch": lambda name: lp.set_active(model, name),
        "enter rows": enter_rows,
        "delete": lambda name: lp.delete_adapter(model, name),
    }


def theirs(model: nn.Module, folder: Path) -> dict[str, Callable[[str], Any]]:
    """The operations in PEFT; it has no context for rows."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, folder, adapter_name="first")
    return {
        "load": lambda name: wrapped.load_adapter(folder, adapter_name=name),
        "switch": wrapped.set_adapter,
        "delete": wrapped.delete_adapter,
    }


def measure(args: argparse.Namespace) -> dict[tuple[str, str, int], float]:
    """Milliseconds by library, operation and number of adapters on the base."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    found: dict[tuple[str, str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = llama(args)
        lp.apply(source, lp.LoRA(r=4, targets=TARGETS))
        lp.save_adapter(source, folder)
        for library, make in {"ours": ours, "peft": theirs}.items():
            run, loaded = make(llama(args), Path(folder)), 0
            for goal in args.adapters:
                while loaded < goal:
                    run["load"](f"a{loaded}")
                    loaded += 1
                for operation in (o for o in OPERATIONS if o in run):
                    times = []
                    for i in range(args.repeats):
                        # Load and delete alternate, with adapters that no other operation uses.
                        name = f"new{i}" if operation in ("load", "delete") else f"a{i % loaded}"
                        start = clock()
                        run[operation](name)
                        times.append(1e3 * (clock() - start))
                    found[library, operation, goal] = Spread.of(times).median
    return found


def markdown(found: dict[tuple[str, str, int], float], args: argparse.Namespace) -> str:
    """The page: the table, the command and the hardware."""
    lines = ["# Growth with the number of adapters", "", f"`python -m benchmarks.growth {' '.join(args.line)}`", ""]
    lines += [f"{hardware('cpu')}; {', '.join(f'{k} {v}' for k, v in versions().items())}", ""]
    lines += [f"Milliseconds, on {4 * args.layers} adapted layers; PEFT's in brackets.", ""]
    lines += [f"| adapters | {' | '.join(OPERATIONS)} |", f"|{'---:|' * (1 + len(OPERATIONS))}"]
    for n in args.adapters:
        cells = [f"{found['ours', o, n]:.1f} ({found.get(('peft', o, n), float('nan')):.1f})" for o in OPERATIONS]
        lines.append(f"| {n} | {' | '.join(cells).replace(' (nan)', '')} |")
    return "\n".join(lines) + "\n"


def main(line: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--layers", type=int, default=4)
    add_run_options(parser, repeats=5)
    args = parse_line(parser, line)
    if args.threads:
        torch.set_num_threads(args.threads)
    page = markdown(measure(args), args)
    print(page)
    if args.markdown:
        args.markdown.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
