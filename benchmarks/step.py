"""What a method costs over its frozen base: training-step time and saved activations, beside PEFT.

    python -m benchmarks.step                                # every case, under three minutes on two cores
    python -m benchmarks.step --case llama --autocast --markdown benchmarks/results/llama.md

Each case runs full fine-tuning, the *floor* (the frozen base with gradients through every layer and no
adapter) and every method of ``METHODS`` in both libraries, in turn within each repetition, so that drift
of the machine hits all alike. ``README.md`` says what each number means.
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
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.cases import CASES, SIZES, Case, build
from benchmarks.measure import (
    Saved,
    Spread,
    forward_loss,
    hardware,
    paired_ratio,
    peak_cuda_bytes,
    saved_bytes,
    train_step,
    versions,
)

# ----------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """One row: the same method in both libraries, each built from a rank and the targets' names.

    Imports belong inside the two functions, so that a missing library skips its variant only.
    """

    ours: Callable[[int, list[str]], object]
    peft: Callable[[int, list[str]], object] | None = None


def lora(dropout: float) -> Method:
    """LoRA with ``alpha = 2 * r``."""

    def ours(rank: int, targets: list[str]) -> object:
        import lightning_peft as lp

        return lp.LoRA(r=rank, alpha=2 * rank, dropout=dropout, targets=targets)

    def theirs(rank: int, targets: list[str]) -> object:
        from peft import LoraConfig

        return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets)

    return Method(ours, theirs)


METHODS: dict[str, Method] = {
    "LoRA": lora(dropout=0.0),
    "LoRA, dropout 0.1": lora(dropout=0.1),
}

# ---------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """A way to train the case's model: ``prepare`` changes it in place and returns what to run."""

    name: str
    prepare: Callable[[Case, int], nn.Module]
    method: str | None = None


def full(case: Case, rank: int) -> nn.Module:
    """Every parameter trains."""
    return case.model


def floor(case: Case, rank: int) -> nn.Module:
    """Nothing trains, but the entry's output asks for its gradient, so backward visits every layer."""
    case.model.requires_grad_(False)
    for module in case.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # a frozen base normalises with its own statistics
    case.model.get_submodule(case.entry).register_forward_hook(_require_grad)
    return case.model


def _require_grad(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def variants(methods: list[str]) -> list[Variant]:
    """Full fine-tuning, the floor, and each method in both libraries, on top of the floor."""
    listed = [Variant("full", full), Variant("floor", floor)]
    for name in methods:
        if METHODS[name].peft is not None:
            listed.append(Variant(f"peft {name}", _with_peft(METHODS[name]), name))
        listed.append(Variant(f"ours {name}", _with_ours(METHODS[name]), name))
    return listed


def _with_peft(method: Method) -> Callable[[Case, int], nn.Module]:
    def prepare(case: Case, rank: int) -> nn.Module:
        from peft import get_peft_model

        return get_peft_model(floor(case, rank), method.peft(rank, case.targets))

    return prepare


def _with_ours(method: Method) -> Callable[[Case, int], nn.Module]:
    def prepare(case: Case, rank: int) -> nn.Module:
        import lightning_peft as lp

        lp.apply(floor(case, rank), method.ours(rank, case.targets))
        return case.model

    return prepare


# ------------------------------------------------------------------------------------------------- a run


@dataclass
class Run:
    """What was measured of one variant.

    Attributes:
        times: seconds per step, one per repetition.
        trainable: number of trainable parameters.
        dtypes: their dtypes.
        adapted: names of the base's modules that own trainable parameters.
        loss: of the first forward, before any step.
        peak: peak CUDA bytes of a step over those allocated before it.
        skipped: why the variant did not run.
    """

    name: str
    method: str | None = None
    times: list[float] = field(default_factory=list)
    saved: Saved | None = None
    trainable: int = 0
    dtypes: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    loss: float = float("nan")
    peak: int | None = None
    skipped: str | None = None


def measure(case: Case, listed: list[Variant], args: argparse.Namespace) -> list[Run]:
    """Measure the variants on copies of one case: memory once each, then time in turn."""
    runs, steps = [], {}
    for variant in listed:
        run = Run(variant.name, variant.method)
        runs.append(run)
        try:
            model = variant.prepare(copy.deepcopy(case), args.rank)
        except (ImportError, AttributeError, NotImplementedError) as error:
            run.skipped = f"{type(error).__name__}: {error}"
            continue
        steps[run.name] = _inspect(run, model, case, args)
    _time([run for run in runs if not run.skipped], steps, args)
    return runs


def _inspect(run: Run, model: nn.Module, case: Case, args: argparse.Namespace) -> Callable[[], float]:
    """Record everything but time, and return the step to be timed."""
    device = torch.device(args.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run.trainable = sum(p.numel() for p in trained.values())
    run.dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trained.values()})
    run.adapted = owners(trained, [name for name, _ in case.model.named_modules() if name])
    with torch.no_grad():
        run.loss = forward_loss(model, case.batch, args.autocast).item()
    run.saved = saved_bytes(lambda: forward_loss(model, case.batch, args.autocast), model, case.batch.values())

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True) if trained else None

    def step() -> float:
        return train_step(model, case.batch, optimizer, args.autocast)

    step()  # the optimizer's state exists from here on
    run.peak = peak_cuda_bytes(step, device)
    return step


def owners(parameters: dict[str, nn.Parameter], modules: list[str]) -> list[str]:
    """The base's modules that hold the parameters: for each the longest module name that starts its name."""
    names = [name.removeprefix("base_model.model.") for name in parameters]
    held = ([m for m in modules if name.startswith(m + ".")] for name in names)
    return sorted({max(found, key=len, default="") for found in held})


def _time(runs: list[Run], steps: dict[str, Callable[[], float]], args: argparse.Namespace) -> None:
    """Round-robin: every repetition runs each variant once, each time starting with another one."""
    gc.collect()
    gc.disable()
    for repetition in range(-args.warmup, args.repeats):
        turn = repetition % len(runs)
        for run in runs[turn:] + runs[:turn]:
            seconds = steps[run.name]()
            if repetition >= 0:
                run.times.append(seconds)
    gc.enable()


def faults(runs: list[Run]) -> list[str]:
    """What makes the comparison unfair: other trainable parameters, targets or dtypes, or another base."""
    done = [run for run in runs if not run.skipped]
    base = _named(done, "floor")
    found = []
    for ours in done:
        peft = _named(done, f"peft {ours.method}")
        if base and ours.method and abs(ours.loss - base.loss) > 1e-2 * abs(base.loss):
            found.append(f"{ours.name}: first loss {ours.loss:.4f}, floor's {base.loss:.4f}")
        if peft is None or peft is ours:
            continue
        if ours.trainable != peft.trainable:
            found.append(f"{ours.name}: {ours.trainable:,} trainable parameters, peft {peft.trainable:,}")
        if ours.adapted != peft.adapted:
            differ = sorted(set(ours.adapted) ^ set(peft.adapted))
            found.append(f"{ours.name}: other targets than peft: {', '.join(differ)}")
        if ours.dtypes != peft.dtypes:
            found.append(f"{ours.name}: trainable in {ours.dtypes}, peft in {peft.dtypes}")
    return found


def _named(runs: list[Run], name: str) -> Run | None:
    return next((run for run in runs if run.name == name and not run.skipped), None)


# ------------------------------------------------------------------------------------------------ report

COLUMNS = [
    "variant",
    "trainable",
    "step ms",
    "min",
    "time / floor",
    "time / peft",
    "saved MB",
    "saved / floor",
    "saved / peft",
]


def rows(runs: list[Run]) -> list[list[str]]:
    """The table's cells, one row per variant, in the order of ``COLUMNS`` (and the CUDA peak where known)."""
    base = _named(runs, "floor")
    return [_row(run, base, _named(runs, f"peft {run.method}")) for run in runs]


def _row(run: Run, base: Run | None, peft: Run | None) -> list[str]:
    if run.skipped:
        return [run.name, "skipped"]
    peft = None if peft is run else peft
    time, saved = Spread.of(run.times), run.saved.activations
    cells = [run.name, f"{run.trainable:,}", f"{1e3 * time.median:.1f}", f"{1e3 * time.min:.1f}"]
    cells += [_ratio(run, base), _ratio(run, peft), f"{saved / 1e6:.2f}"]
    cells += [f"{saved / other.saved.activations:.3f}" if other else "" for other in (base, peft)]
    if run.peak is not None:
        cells.append(f"{run.peak / 1e6:.1f}")
    return cells


def _ratio(run: Run, reference: Run | None) -> str:
    if reference is None:
        return ""
    ratio = paired_ratio(run.times, reference.times)
    return f"{ratio.median:.3f} ({ratio.low:.2f}..{ratio.high:.2f})"


def columns(device: str) -> list[str]:
    """The table's headings on a device."""
    return [*COLUMNS, "peak MB"] if device == "cuda" else COLUMNS


def heading(name: str, case: Case, args: argparse.Namespace) -> str:
    """One line that says what was run."""
    precision = f"{args.dtype}{', bfloat16 autocast' if args.autocast else ''}"
    count = sum(p.numel() for p in case.model.parameters())
    return f"{name} ({args.size}): {count:,} parameters, {case.tokens} rows, r = {args.rank}, {precision}"


def show(title: str, runs: list[Run], args: argparse.Namespace, console: Console) -> None:
    """Print a case's table and the batch's own saved bytes."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns(args.device)):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for cells in rows(runs):
        table.add_row(*cells)
    console.print(table)
    batch = {run.saved.batch for run in runs if run.saved}
    for line in skipped(runs):
        console.print(line, style="yellow")
    console.print(f"saved of the batch itself, not counted above: {sorted(batch)} bytes", highlight=False)


def skipped(runs: list[Run]) -> list[str]:
    """Why each variant without numbers has none."""
    return [f"skipped {run.name}: {run.skipped}" for run in runs if run.skipped]


def markdown(sections: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """The report as a page for ``benchmarks/results``."""
    head = columns(args.device)
    lines = ["# Step cost over the frozen floor", ""]
    lines += [f"Command: `python -m benchmarks.step {' '.join(args.line)}`.", ""]
    lines += [f"Hardware: {hardware(args.device)}.", ""]
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".", ""]
    lines += [f"{args.repeats} repetitions; ratios are medians of paired ratios (quartiles in brackets)."]
    for title, runs in sections.items():
        lines += ["", f"## {title}", "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        lines += [_line(cells + [""] * (len(head) - len(cells))) for cells in rows(runs)]
        lines += ["", *(f"- not comparable: {fault}" for fault in faults(runs))]
        lines += [f"- {reason}" for reason in skipped(runs)]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_json(sections: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """Every raw number: seconds per repetition, bytes, counts."""
    about = {"hardware": hardware(args.device), "versions": versions(), "arguments": vars(args)}
    cases = {title: [asdict(run) for run in runs] for title, runs in sections.items()}
    return json.dumps({**about, "cases": cases}, indent=1, default=str)


# -------------------------------------------------------------------------------------------------- main


def parse(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast around the forward")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every raw number here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args(line)
    args.line = sys.argv[1:] if line is None else line
    return args


def main(line: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if some comparison was not a fair one."""
    args = parse(line)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file or a pipe has no width of its own
    console.print(hardware(args.device), versions(), highlight=False)
    sections, unfair = {}, []
    for name in args.case:
        case = build(name, args.size, torch.device(args.device), getattr(torch, args.dtype))
        runs = measure(case, variants(args.method), args)
        title = heading(name, case, args)
        sections[title] = runs
        show(title, runs, args, console)
        for fault in faults(runs):
            unfair.append(fault)
            console.print(f"NOT COMPARABLE: {fault}", style="bold red")
    if args.json:
        args.json.write_text(as_json(sections, args))
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(sections, args))
    return 1 if unfair else 0


if __name__ == "__main__":
    sys.exit(main())
