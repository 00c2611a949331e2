"""A study's results as a markdown page and a plot."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import hardware, versions
from benchmarks.real.study import Result, Study


def headers(study: Study) -> list[str]:
    """The table's columns."""
    return ["method", "trainable", "%", *study.metrics, "step ms", "checkpoint kB", "lr"]


def cells(study: Study, result: Result) -> list[str]:
    """One row of the table."""
    trained = result.step_ms is not None
    return [
        result.label,
        f"{result.trainable:,}",
        f"{result.percent:.3g}",
        *[form.format(result.scores[name]) for name, form in study.metrics.items()],
        f"{result.step_ms:.0f}" if result.step_ms is not None else "",
        f"{result.checkpoint / 1000:,.1f}" if trained else "",
        f"{result.lr:g}" if trained else "",
    ]


def write(study: Study, results: list[Result], path: Path, steps: int, seed: int, seconds: float) -> None:
    """Write the page, and the plot beside it where matplotlib is installed."""
    found = versions()
    found["lightning"] = importlib.metadata.version("lightning")
    found.pop("peft", None)
    lines = [
        f"# {study.title}",
        "",
        study.task,
        "",
        f"Each run: {steps} steps of AdamW, linear warmup and decay, seed {seed}. Learning rate: the best of "
        f"{study.grid} on data held out for that. `step ms` is the median time of a training step; "
        "`checkpoint kB` what a weights-only checkpoint takes on disk.",
        "",
        "| " + " | ".join(headers(study)) + " |",
        "|---|" + "---:|" * (len(headers(study)) - 1),
        *("| " + " | ".join(cells(study, result)) + " |" for result in results),
        "",
    ]
    if _plot(study, results, path.with_suffix(".png")):
        lines += [f"![{study.title}]({path.stem}.png)", ""]
    if any(result.samples for result in results):
        lines += ["## What they write", "", "Greedily, at most 80 tokens, for these in turn:", ""]
        lines += [*(f"- `{prompt}`" for prompt in study.prompts), ""]
        for result in results:
            lines += [f"- **{result.label}**", *(f"    - {sample}" for sample in result.samples)]
        lines.append("")
    lines += [
        "## How it was made",
        "",
        "```bash",
        shlex.join(["python", "-m", "benchmarks.real", *sys.argv[1:]]),
        "```",
        "",
        f"{seconds / 60:.0f} minutes on {hardware('cpu')}, shared with other work while it ran, so that step times "
        "are good to about a fifth. " + ", ".join(f"{name} {version}" for name, version in found.items()) + ".",
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _plot(study: Study, results: list[Result], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    metric = next(iter(study.metrics))
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for result in results:
        value = result.scores[metric]
        if result.trainable == 0:
            axes.axhline(value, color="gray", linestyle=":", linewidth=1)
            axes.annotate(result.label, (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
            continue
        axes.scatter(result.percent, value, s=22, color="C0")
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters, % of all")
    axes.set_ylabel(f"{metric} on test data ({'higher' if study.higher_is_better else 'lower'} is better)")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, [(r.label, r.percent, r.scores[metric]) for r in results if r.trainable])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return True


def _label(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Write each label beside its point, at the first of some places where it covers no other."""
    places = [(5, 3, "left"), (5, -10, "left"), (-5, 3, "right"), (-5, -10, "right"), (5, 12, "left"), (5, -19, "left")]
    taken: list[Any] = []
    for label, x, y in points:
        for dx, dy, side in places:
            text = axes.annotate(label, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (dx, dy, side) == places[-1]:
                break
            text.remove()
        taken.append(box)
