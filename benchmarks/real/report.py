"""Write a study's results as a markdown page and a plot."""

from __future__ import annotations

import importlib.metadata
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import hardware, versions
from benchmarks.real.store import Result, Store
from benchmarks.real.study import Row, Study

Found = dict[Row, list[Result]]


def table(study: Study, found: Found) -> Table:
    """The results for the terminal."""
    shown = Table(title=study.title, title_justify="left")
    for index, header in enumerate(_headers(study)):
        shown.add_column(header, justify="right" if index else "left")
    for cells in _cells(study, found):
        shown.add_row(*cells)
    return shown


def write(study: Study, store: Store, found: Found, path: Path) -> None:
    """Write the page, and the plot next to it if matplotlib is installed."""
    compared = {row: results for row, results in found.items() if not row.probe}
    probes = {row: results for row, results in found.items() if row.probe}
    lines = [f"# {study.title}", "", study.task, "", _protocol(found), "", *_markdown(study, compared)]
    if _plot(study, compared, path.with_suffix(".svg")):
        lines += [f"![{study.title}]({path.stem}.svg)", ""]
    if probes:
        lines += ["## Variants of some methods", "", study.probes, "", *_markdown(study, probes)]
    lines += _samples(study, compared)
    lines += _searches(study, store, found)
    lines += _made(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _headers(study: Study) -> list[str]:
    return ["method", "trainable", "%", *study.metrics, "step ms", "step / full", "checkpoint kB", "lr"]


def _cells(study: Study, found: Found) -> list[list[str]]:
    """The rows of the table: means over the seeds, with their standard deviation."""
    full = next((_step_ms(results) for row, results in found.items() if row.method == "FullFineTuning"), None)
    lines = []
    for row, results in found.items():
        first, step = results[0], _step_ms(results)
        cells = [row.label, f"{first.trainable:,}", f"{first.percent:.3g}"]
        cells += [_spread([r.scores[name] for r in results], form) for name, form in study.metrics.items()]
        if step is None:
            cells += [""] * 4
        else:
            cells += [f"{step:.0f}", f"{step / full:.2f}" if full else "", f"{first.checkpoint / 1000:,.1f}"]
            cells += [f"{first.setting.lr:g}"]
        lines.append(cells)
    return lines


def _markdown(study: Study, found: Found) -> list[str]:
    headers = _headers(study)
    rows = [headers, ["---"] + ["---:"] * (len(headers) - 1), *_cells(study, found)]
    return [*("| " + " | ".join(cells) + " |" for cells in rows), ""]


def _step_ms(results: list[Result]) -> float | None:
    steps = [r.step_ms for r in results if r.step_ms is not None]
    return statistics.median(steps) if steps else None


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _protocol(found: Found) -> str:
    results = [result for row, of_row in found.items() if row.method is not None for result in of_row]
    steps = "/".join(sorted({str(result.setting.steps) for result in results}))
    seeds = sorted({result.setting.seed for result in results})
    scores = f"seed {seeds[0]}"
    if len(seeds) > 1:
        scores = f"scores are means over the seeds {', '.join(map(str, seeds))}, ± their standard deviation"
    return (
        f"Each run takes {steps} steps of AdamW with linear warmup and decay; {scores}. `step ms` is the median "
        "processor time of a training step, `step / full` its ratio to full fine-tuning's; `checkpoint kB` is the "
        "size of a weights-only checkpoint on disk; `lr` is the peak learning rate."
    )


def _samples(study: Study, found: Found) -> list[str]:
    if not any(result.samples for results in found.values() for result in results):
        return []
    lines = [
        "## Generated texts",
        "",
        "Greedy decoding, at most 80 tokens, first seed, for these two sets of attributes:",
        "",
    ]
    lines += [*(f"- `{prompt}`" for prompt in study.prompts), ""]
    for row, (first, *_) in found.items():
        lines += [f"- **{row.label}**", *(f"    - {sample}" for sample in first.samples)]
    return [*lines, ""]


def _searches(study: Study, store: Store, found: Found) -> list[str]:
    tried = {row.label: store.tried(study.name, row.call) for row in found if row.method is not None}
    tried = {label: results for label, results in tried.items() if results}
    if not tried:
        return []
    rates = sorted({r.setting.lr for results in tried.values() for r in results})
    steps = next(iter(tried.values()))[0].setting.steps
    notes = [f"Loss on held-out data after {steps} steps. A search ends when both neighbours of the best are worse."]
    notes += [f'"{row.label}" uses the rate of "{row.lr_of}".' for row in found if row.lr_of]
    written = [row.label for row in found if row.method is not None and not row.lr_of and row.label not in tried]
    notes += [f"Not searched, with the rate as written in the study: {', '.join(written)}."] if written else []
    lines = ["## Learning rates that were tried", "", " ".join(notes), ""]
    lines += ["| method | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---|" + "---:|" * len(rates)]
    for label, results in tried.items():
        losses = {r.setting.lr: r.scores["loss"] for r in results}
        shown = {
            lr: f"**{loss:.3f}**" if loss == min(losses.values()) else f"{loss:.3f}" for lr, loss in losses.items()
        }
        lines.append(f"| {label} | " + " | ".join(shown.get(lr, "") for lr in rates) + " |")
    return [*lines, ""]


def _made(found: Found) -> list[str]:
    versions_found = {name: version for name, version in versions().items() if name != "peft"}
    versions_found["lightning"] = importlib.metadata.version("lightning")
    seconds = sum(result.seconds for results in found.values() for result in results)
    return [
        "## How the results were made",
        "",
        "```bash",
        shlex.join(["python", "-m", "benchmarks.real", *_shown(sys.argv[1:])]),
        "```",
        "",
        f"{seconds / 60:.0f} minutes without the search, on {hardware('cpu')}, shared with much other work. "
        + ", ".join(f"{name} {version}" for name, version in versions_found.items())
        + ".",
        "",
    ]


def _shown(arguments: list[str]) -> list[str]:
    """The command, without folders of this machine."""
    return ["DATA" if before == "--data" else word for before, word in zip(["", *arguments], arguments, strict=False)]


def _plot(study: Study, found: Found, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = study.name  # makes the file reproducible
    metric = next(iter(study.metrics))
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    points = []
    for row, results in found.items():
        values = [result.scores[metric] for result in results]
        if row.method is None:
            axes.axhline(values[0], color="gray", linestyle=":", linewidth=1)
            axes.annotate(row.label, (0.01, values[0]), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
            continue
        points.append((row.label, results[0].trainable, statistics.fmean(values)))
        axes.vlines(results[0].trainable, min(values), max(values), color="C0", linewidth=1)
    axes.scatter([x for _, x, _ in points], [y for _, _, y in points], s=22, color="C0")
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{metric} on test data ({'higher' if study.higher_is_better else 'lower'} is better)")
    axes.margins(x=0.15, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()  # fixes the limits of the axes, on which the labels' positions depend
    _label(axes, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


def _label(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Write each label next to its point, at the first position where it overlaps neither a point nor another label."""
    places = [(5, 3, "left"), (5, -10, "left"), (-5, 3, "right"), (-5, -10, "right"), (5, 12, "left"), (5, -19, "left")]
    places += [(-5, 12, "right"), (-5, -19, "right"), (5, 21, "left"), (5, -28, "left")]
    from matplotlib.transforms import Bbox

    centres = axes.transData.transform([(x, y) for _, x, y in points])
    taken: list[Any] = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    for label, x, y in points:
        for dx, dy, side in places:
            text = axes.annotate(label, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (dx, dy, side) == places[-1]:
                break
            text.remove()
        taken.append(box)
