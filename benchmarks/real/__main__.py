"""Compare methods on real data with real pretrained weights.

    python -m benchmarks.real cifar --data ~/data                      # every method of one study
    python -m benchmarks.real cifar --methods lora ssf --steps 50      # those whose label holds a word, fewer steps
    python -m benchmarks.real e2e --seeds 0 1 --store e2e.jsonl --markdown e2e.md

For each method, the learning rate is searched on held-out data; then the method is trained and tested once per seed.
Data, steps and schedule are the same for all methods; only the callback and its learning rate differ. Runs in --store
are not repeated, so an interrupted command continues where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console

import lightning_peft as lp
from benchmarks.real import STUDIES, load, report
from benchmarks.real import study as studies
from benchmarks.real.store import Result, Store
from benchmarks.real.study import MissingData, Row, Study


def main(arguments: list[str] | None = None) -> int:
    """Run one study. Returns 0 if every available method ran."""
    options = _parse(arguments)
    if options.data is not None:
        studies.DATA = options.data
    study, store = load(options.study), Store(options.store)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = [row for row in study.rows if _wanted(row, options.methods)]
    if not rows:
        console.print(f"no label holds any of {options.methods}; there are: {', '.join(r.label for r in study.rows)}")
        return 2
    try:
        found, failed = _run(study, store, rows, options, console)
    except MissingData as error:
        console.print(f"skipped: {error}")
        return 0
    if not found:
        return 1
    console.print(report.table(study, found))
    if options.markdown is not None:
        report.write(study, store, found, options.markdown)
    return int(failed)


def _run(
    study: Study, store: Store, rows: list[Row], options: argparse.Namespace, console: Console
) -> tuple[dict[Row, list[Result]], bool]:
    """The results of each row that could be run, one for each seed, and whether any failed."""
    steps, search_steps = (
        default if asked is None else asked
        for asked, default in ((options.steps, study.steps), (options.search_steps, study.search_steps))
    )
    found: dict[Row, list[Result]] = {}
    broken: set[Row] = set()
    # the seed is the outer loop, so that an interrupted study has a complete comparison for some seeds
    for seed in options.seeds:
        for row in rows:
            if row.method is not None and not hasattr(lp, row.method):
                if seed == options.seeds[0]:
                    console.print(f"skipped: {row.label}: lightning_peft has no {row.method}")
                continue
            if row in broken or (row.method is None and row in found):
                continue
            try:
                lr = _rate(study, store, row, search_steps, console) if row.method is not None else 0.0
                result = _made(study, store, row, lr, steps, seed, tuning=False)
            except MissingData:
                raise
            except Exception as error:
                if options.traceback:
                    raise
                console.print(f"failed: {row.label}: {type(error).__name__}: {error}", style="red")
                broken.add(row)
                continue
            found.setdefault(row, []).append(result)
            shown = ", ".join(f"{k} {f.format(result.scores[k])}" for k, f in study.metrics.items())
            console.print(f"{row.label}, seed {seed}, lr {lr:g}: {shown}, {result.seconds:.0f} s", highlight=False)
    return found, bool(broken)


def _rate(study: Study, store: Store, row: Row, steps: int, console: Console) -> float:
    if row.lr_of:
        row = next(other for other in study.rows if other.label == row.lr_of)

    if steps == 0:
        return row.lr

    def loss(lr: float) -> float:
        value = _made(study, store, row, lr, steps, 0, tuning=True).scores["loss"]
        console.print(f"  {row.label}, lr {lr:g}: held-out loss {value:.3f}", highlight=False)
        return value

    return studies.search(row.lr, loss)


def _made(study: Study, store: Store, row: Row, lr: float, steps: int, seed: int, tuning: bool) -> Result:
    """Return the run from the store; if it is missing, run and store it."""
    result = store.get(study.setting(row, lr, steps, seed, tuning))
    if result is None:
        with tempfile.TemporaryDirectory() as folder:
            study.prepare(Path(folder), tuning)
            result = study.run(row, lr, steps, seed, tuning)
        store.add(result)
    return result


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, help="data folder (default: LIGHTNING_PEFT_DATA, ../shared/data)")
    parser.add_argument("--methods", nargs="+", help="run only rows whose label contains one of these words")
    parser.add_argument("--steps", type=int, help="optimizer steps per run (default: the study's)")
    parser.add_argument(
        "--search-steps", type=int, help="steps per run of the learning-rate search (default: the study's)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--store", type=Path, help="append each run to this file as a JSON line, and reuse its runs")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, and a plot (.svg) next to it")
    parser.add_argument("--traceback", action="store_true", help="stop at the first failure")
    return parser.parse_args(arguments)


def _wanted(row: Row, words: list[str] | None) -> bool:
    return words is None or any(word.lower() in row.label.lower() for word in words)


if __name__ == "__main__":
    sys.exit(main())
