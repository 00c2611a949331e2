"""Compare methods on real data with real pretrained weights.

    python -m benchmarks.real e2e --markdown docs/results/e2e.md        # every method, one after the other
    python -m benchmarks.real cifar --methods lora ssf                  # those whose label holds a word
    python -m benchmarks.real banking77 --tune 1e-3 3e-3                # learning rates, on data held out for that

Every run has the same data, number of steps, schedule and seed; it differs in the callback and its learning rate.
The data lies beside the repository or where LIGHTNING_PEFT_DATA says; without it a study says so and stops.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lightning_peft as lp
from benchmarks.real import STUDIES, load, report
from benchmarks.real.study import MissingData, Result, Row, Study


def main(arguments: list[str] | None = None) -> int:
    """Run one study; 0 if every method that is there ran."""
    options = _parse(arguments)
    study = load(options.study)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = [row for row in study.rows if _wanted(row, options.methods)]
    if not rows:
        console.print(f"no label holds any of {options.methods}; there are: {', '.join(r.label for r in study.rows)}")
        return 2
    steps = options.steps or study.steps
    start, failed = time.perf_counter(), False
    with tempfile.TemporaryDirectory() as folder:
        try:
            study.prepare(Path(folder), tuning=bool(options.tune))
        except MissingData as error:
            console.print(f"skipped: {error}")
            return 0
        results: list[Result] = []
        for row in rows:
            if row.method is not None and not hasattr(lp, row.method):
                console.print(f"skipped: {row.label}: lightning_peft has no {row.method}")
                continue
            for lr in options.tune or [row.lr]:
                try:
                    result = study.run(row, lr, steps, options.seed)
                except Exception as error:
                    console.print(f"failed: {row.label}: {type(error).__name__}: {error}", style="red")
                    failed = True
                    if options.traceback:
                        raise
                    continue
                results.append(result)
                shown = ", ".join(f"{k} {f.format(result.scores[k])}" for k, f in study.metrics.items())
                console.print(f"{row.label}, lr {lr:g}: {shown}", highlight=False)
                if row.method is None:
                    break
    if not results:
        return 1
    console.print(_table(study, results))
    for result in results if not options.tune else ():
        for sample in result.samples:
            console.print(f"  {result.label}: {sample}", highlight=False, markup=False)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s")
    if options.markdown is not None:
        report.write(study, results, options.markdown, steps, options.seed, seconds)
    return int(failed)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--methods", nargs="+", help="words: only rows whose label holds one of them")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: the study's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--tune", nargs="+", type=float, metavar="LR", help="try these rates, on data held out for that"
    )
    parser.add_argument("--markdown", type=Path, help="write the table there, and a plot beside it (.png)")
    parser.add_argument("--traceback", action="store_true", help="stop at the first failure")
    options = parser.parse_args(arguments)
    if options.tune and options.markdown:
        parser.error("--markdown is for test results; --tune gives none")
    return options


def _wanted(row: Row, words: list[str] | None) -> bool:
    return words is None or any(word.lower() in row.label.lower() for word in words)


def _table(study: Study, results: list[Result]) -> Table:
    table = Table(title=study.title, title_justify="left")
    for index, header in enumerate(report.headers(study)):
        table.add_column(header, justify="right" if index else "left")
    for result in results:
        table.add_row(*report.cells(study, result))
    return table


if __name__ == "__main__":
    sys.exit(main())
