"""Measure the cost of a method over its frozen base, here and in PEFT: training-step time, saved activations.

    python -m benchmarks.step --json step.json --markdown benchmarks/results/cpu.md --threads 1 --clock cpu
    python -m benchmarks.step --case llama --method LoRA DoRA --repeats 40

Each row of ``methods.py`` is measured on each of its cases, together with the *floor* (the frozen base with gradients
through every layer and no adapter) and PEFT's variant. The three take turns within each repetition, so that slow
moments of the machine affect all of them. With ``--json``, an interrupted run continues where it stopped. ``README.md``
explains each number.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import lightning_peft as lp
from benchmarks.cases import CASES, SIZES, Case, build
from benchmarks.measure import (
    Saved,
    add_run_options,
    forward_loss,
    hardware,
    parse_line,
    peak_cuda_bytes,
    saved_bytes,
    train_step,
    versions,
)
from benchmarks.methods import METHODS, Hooks, Method
from benchmarks.page import line_of, markdown, plot

# ---------------------------------------------------------------------------------------------- variants


@dataclass
class Variant:
    """A model that is ready to be measured, and the functions that its method needs in a step."""

    model: nn.Module
    hooks: Hooks = field(default_factory=Hooks)


def frozen(case: Case, entry: bool) -> Case:
    """Freeze everything. With ``entry``, its output requires grad, so that backward passes through every layer."""
    case.model.requires_grad_(False)
    for module in case.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # a frozen base normalises with its stored statistics
    if entry:
        case.model.get_submodule(case.entry).register_forward_hook(_require_grad)
    return case


def _require_grad(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def floor(case: Case, method: Method, rank: int) -> Variant:
    """The frozen base."""
    return Variant(frozen(case, entry=True).model)


def ours(case: Case, method: Method, rank: int) -> Variant:
    """The base with this library's adapter."""
    callback = method.ours(frozen(case, method.entry), rank)
    lp.apply(case.model, callback)
    return Variant(case.model, method.steps(callback, case.model))


def peft(case: Case, method: Method, rank: int) -> Variant:
    """The base with PEFT's adapter."""
    assert method.peft is not None
    model = method.peft(frozen(case, method.entry), rank)
    return Variant(model, method.peft_steps(model))


# ------------------------------------------------------------------------------------------------- a row


@dataclass
class Run:
    """The measurements of one variant.

    Attributes:
        times: seconds per step, one per repetition.
        saved: the bytes that the forward saves for backward.
        trainable: number of trainable parameters.
        dtypes: their dtypes.
        adapted: names of the base's modules that own trainable parameters.
        loss: the loss of the first forward, before any step.
        peak: peak CUDA bytes of a step minus those allocated before it.
        skipped: why the variant did not run.
    """

    times: list[float] = field(default_factory=list)
    saved: Saved = field(default_factory=Saved)
    trainable: int = 0
    dtypes: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    loss: float = float("nan")
    peak: int | None = None
    skipped: str | None = None

    @classmethod
    def load(cls, stored: dict) -> Run:
        """Rebuild the measurements from the dictionary that ``asdict`` made."""
        return cls(**{**stored, "saved": Saved(**stored["saved"])})


Row = dict[str, Run]  # "floor", "ours" and, if PEFT has the method, "peft"


def measure(name: str, case_name: str, case: Case, args: argparse.Namespace) -> Row:
    """Measure one method on copies of one case: first the memory of each variant, then the times in turn."""
    method, makers = METHODS[name], {"floor": floor, "ours": ours, "peft": peft}
    row: Row = {}
    steps: dict[str, Callable[[], float]] = {}
    for which, make in makers.items():
        if which == "peft" and method.peft is None:
            continue
        row[which] = run = Run()
        if which == "peft" and case_name in method.lacks:
            run.skipped = method.lacks[case_name]
            continue
        try:
            variant = make(copy.deepcopy(case), method, args.rank)
        except ImportError as error:
            run.skipped = f"{type(error).__name__}: {error}"
            continue
        steps[which] = inspect(run, variant, case, args)
    take_turns({which: row[which] for which in steps}, steps, args)
    return row


def inspect(run: Run, variant: Variant, case: Case, args: argparse.Namespace) -> Callable[[], float]:
    """Record everything except time, and return the step to be timed."""
    model, hooks = variant.model, variant.hooks
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run.trainable = sum(p.numel() for p in trained.values())
    run.dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trained.values()})
    run.adapted = owners(trained, [name for name, _ in case.model.named_modules() if name])
    hooks.begin()
    with torch.no_grad():
        run.loss = forward_loss(model, case.batch, args.autocast).item()
    run.saved = saved_bytes(lambda: forward_loss(model, case.batch, args.autocast), model, case.batch.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True) if trained else None

    def step() -> float:
        return train_step(model, case.batch, optimizer, args.autocast, hooks, args.clock)

    step()  # creates the optimizer's state, which must not count in the first timed step
    run.peak = peak_cuda_bytes(step, torch.device(args.device))
    return step


def owners(parameters: dict[str, nn.Parameter], modules: list[str]) -> list[str]:
    """The base's modules that hold the parameters: for each, the longest module name that is a prefix of its name."""
    names = [name.removeprefix("base_model.model.").removeprefix("base_model.") for name in parameters]
    held = ([m for m in modules if name.startswith(m + ".")] for name in names)
    return sorted({max(found, key=len, default="") for found in held})


def take_turns(row: Row, steps: dict[str, Callable[[], float]], args: argparse.Namespace) -> None:
    """Run each variant once per repetition, starting with a different one each time."""
    gc.collect()
    gc.disable()
    order = list(row)
    for repetition in range(-args.warmup, args.repeats):
        turn = repetition % len(order)
        for which in order[turn:] + order[:turn]:
            seconds = steps[which]()
            if repetition >= 0:
                row[which].times.append(seconds)
    gc.enable()


def faults(name: str, row: Row) -> list[str]:
    """Return why a row is not comparable: the base, the trainable parameters, targets or dtypes differ."""
    mine, theirs, base = row["ours"], row.get("peft"), row["floor"]
    found = []
    if METHODS[name].identity and abs(mine.loss - base.loss) > 1e-2 * abs(base.loss):
        found.append(f"first loss {mine.loss:.4f}, the floor's {base.loss:.4f}")
    if theirs is None or theirs.skipped:
        return found
    if mine.trainable != theirs.trainable:
        found.append(f"{mine.trainable:,} trainable parameters, PEFT {theirs.trainable:,}")
    if METHODS[name].identity and mine.adapted != theirs.adapted:
        found.append(f"targets that differ from PEFT's: {', '.join(sorted(set(mine.adapted) ^ set(theirs.adapted)))}")
    if mine.dtypes != theirs.dtypes:
        found.append(f"trainable in {mine.dtypes}, PEFT in {theirs.dtypes}")
    return found


def report(case_name: str, name: str, row: Row, console: Console) -> int:
    """Print a row and the reasons why it is not comparable; return their number."""
    console.print(f"{case_name:7}{name:22}{line_of(row)}")
    found = faults(name, row)
    for fault in found:
        console.print(f"NOT COMPARABLE: {fault}", style="bold red")
    return len(found)


# -------------------------------------------------------------------------------------------------- main

SETTINGS = ("size", "rank", "dtype", "autocast", "device", "threads", "clock", "repeats")


def parse(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the base")
    parser.add_argument("--autocast", action="store_true", help="run forward under bfloat16 autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_run_options(parser, repeats=15, page="the tables, and a plot next to them,")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="store every raw number here; rows already in the file are skipped")
    parser.add_argument("--redo", action="store_true", help="also run rows that are already in the file")
    return parse_line(parser, line)


def stored(args: argparse.Namespace) -> dict:
    """The stored results of a run with these settings; empty if there are none."""
    about = {
        "command": " ".join(args.line),
        "hardware": hardware(args.device),
        "versions": versions(),
        "settings": {key: getattr(args, key) for key in SETTINGS},
    }
    if args.json is None or not args.json.exists():
        return {**about, "cases": {}}
    before = json.loads(args.json.read_text())
    if before["settings"] != about["settings"]:
        raise SystemExit(f"{args.json} holds a run with other settings, {before['settings']}: pass another file")
    return before


def main(line: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if some row was not comparable."""
    args = parse(line)
    if args.threads:
        torch.set_num_threads(args.threads)
    console, results, unfair = Console(soft_wrap=True, highlight=False), stored(args), 0
    console.print(results["hardware"], results["versions"])
    for case_name in args.case:
        chosen = [m for m in args.method if case_name in METHODS[m].on]
        if not chosen:
            continue
        done = results["cases"].setdefault(case_name, {"rows": {}})
        todo = [m for m in chosen if args.redo or m not in done["rows"]]
        if todo:
            case = build(case_name, args.size, torch.device(args.device), getattr(torch, args.dtype))
            count = sum(p.numel() for p in case.model.parameters())
            done["title"] = f"{case_name}: {count:,} parameters, {case.tokens} rows"
        for name in todo:
            row = measure(name, case_name, case, args)
            done["rows"][name] = {which: asdict(run) for which, run in row.items()}
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
            unfair += report(case_name, name, row, console)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        picture = args.markdown.with_suffix(".png")
        cases = {
            name: (case["title"], {m: {w: Run.load(r) for w, r in row.items()} for m, row in case["rows"].items()})
            for name, case in results["cases"].items()
        }
        plot(cases, picture)
        args.markdown.write_text(markdown(results, cases, picture.name, faults))
    return 1 if unfair else 0


if __name__ == "__main__":
    sys.exit(main())
