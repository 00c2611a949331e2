"""Write results.csv and report.md, and print the table and the recommendation."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.table import Table

from lightning_peft.compare.recommend import Recommendation, Summary, summarise
from lightning_peft.compare.store import Failure, Part, Result
from lightning_peft.compare.study import Plan
from lightning_peft.core.state.atomic_file import new_file

__all__ = ["Findings", "command", "setting", "table", "write"]

_PACKAGES = ("torch", "lightning", "transformers", "optuna", "lightning_peft")


@attrs.frozen
class Findings:
    """Everything that a report needs.

    Attributes:
        title: what was compared.
        metric: the name of the compared metric.
        lower: whether lower values are better.
        results: every run.
        failures: the candidates that could not run.
        recommendations: one for each fraction of the data.
        base: the metric of the base without training, or None.
        base_command: the start of the command that trains a candidate in full.
        setting: sentences about steps, searches and seeds.
        minutes: wall time of all runs and searches.
        distance: how forgetting is measured, ``"kl"`` or ``"cosine"``.
        parts: the runs that halving stopped early.
        search_metric: the metric by which it ranked them.
    """

    title: str
    metric: str
    lower: bool
    results: Sequence[Result]
    failures: Sequence[Failure]
    recommendations: Mapping[float, Recommendation]
    base: float | None
    base_command: Sequence[str]
    setting: Sequence[str]
    minutes: float
    distance: str = "kl"
    parts: Sequence[Part] = ()
    search_metric: str = ""


def setting(plan: Plan) -> list[str]:
    """Sentences about steps, searches and seeds."""
    search = f"{plan.trials} trials of {plan.search_steps} steps with seed 0 chose the values of each method"
    chosen = search if plan.trials else "No search: each method has its usual learning rate"
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "1 seed"
    finalists = f"The {min(plan.finalists, len(plan.candidates))} best methods ran with {seeds}, the others with one."
    if plan.halving:
        half = "the better half" if plan.trials else "every method"
        finalists = (
            f"Then {half} ran for {plan.part_steps} steps, and the best {plan.finalists} to the end with {seeds}."
        )
    return [
        f"Each run has {plan.steps} optimizer steps on the same data.",
        f"{chosen}.",
        finalists,
        "The number after ± is the standard error of the mean, from the variance between seeds pooled over all "
        "methods.",
    ]


def command(start: Sequence[str], result: Result) -> str:
    """The command that trains a candidate in full."""
    return shlex.join([*start, *result.flags, f"--seed_everything={result.seed}"])


def write(found: Findings, folder: Path) -> None:
    """Write ``results.csv``, ``report.md`` and the plots to ``folder``; each file completely or not at all."""
    _write_csv(found, folder / "results.csv")
    images = []
    try:
        from lightning_peft.compare.plots import draw
    except ModuleNotFoundError:
        pass  # matplotlib is not installed
    else:
        images = draw(found, folder)
    with new_file(folder / "report.md") as path:
        path.write_text(_markdown(found, images))


def _write_csv(found: Findings, path: Path) -> None:
    many = len(found.recommendations) > 1
    columns = ["method", "seed", found.metric, "trainable", "step_ms", "peak_mb", "checkpoint_mb"]
    columns += ["forgetting_loss", f"forgetting_{found.distance}", "config", *(["fraction"] if many else [])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in found.results:
        config = json.dumps({"class": result.method, "arguments": result.flags})
        own = {"method": result.label, found.metric: result.metric, "config": config}
        writer.writerow({**attrs.asdict(result), **own, f"forgetting_{found.distance}": result.divergence})
    with new_file(path) as made:
        made.write_text(text.getvalue())


_COLUMNS = ("method", "seeds", "{metric}", "trainable", "step ms", "peak MB", "checkpoint MB", "minutes")
_FORGETTING = ("forgetting loss", "forgetting {distance}")
_REPORT_ONLY = ("seeds", "checkpoint MB", "minutes", "forgetting loss")  # too wide for a terminal


def _rows(found: Findings, fraction: float) -> tuple[list[str], list[list[str]]]:
    summaries = summarise([r for r in found.results if r.fraction == fraction], found.lower)
    forgets = any(s.mean("divergence") is not None for s in summaries)
    header = [
        name.format(metric=found.metric, distance=found.distance)
        for name in (*_COLUMNS, *(_FORGETTING if forgets else ()), "lr")
    ]
    rows = []
    for s in summaries:
        numbers = [f"{s.trainable:,}", f"{s.mean('step_ms'):.1f}", f"{s.mean('peak_mb'):.0f}"]
        numbers += [f"{s.mean('checkpoint_mb'):.3f}", f"{s.mean('minutes'):.2f}"]
        if forgets:
            numbers += [_number(s.mean("forgetting_loss")), _number(s.mean("divergence"))]
        searched = "".join(f", {name} {value}" for name, value in s.runs[0].values.items() if name != "lr")
        rows.append([s.label, str(len(s.runs)), _value(s), *numbers, f"{s.runs[0].values['lr']:.2g}{searched}"])
    return header, rows


def _value(s: Summary) -> str:
    return f"{s.metric:.4g}" if s.error is None else f"{s.metric:.4g} ± {s.error:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(found: Findings, fraction: float) -> Table:
    """The results of one fraction of the data, for the terminal."""
    header, rows = _rows(found, fraction)
    title = found.title if fraction == 1 else f"{found.title}, {fraction:g} of the data"
    made = Table(title=title, title_justify="left")
    shown = [i for i, name in enumerate(header) if name not in _REPORT_ONLY]
    for name in (header[i] for i in shown):
        made.add_column(name, justify="left" if name in ("method", "lr") else "right")
    chosen = found.recommendations[fraction].chosen
    for row in rows:
        made.add_row(*(row[i] for i in shown), style="bold" if chosen is not None and row[0] == chosen.label else None)
    return made


def advice(found: Findings, fraction: float) -> list[str]:
    """The recommendation of one fraction in plain lines; the command comes last."""
    recommendation = found.recommendations[fraction]
    lines = [f"{reason}." for reason in recommendation.reasons]
    if recommendation.chosen is None:
        return ["No method is recommended.", *lines]
    best = recommendation.chosen
    return [f"Take {best.label}.", *lines, "Train it in full:", command(found.base_command, best.runs[0])]


def _markdown(found: Findings, images: Sequence[tuple[str, Path]]) -> str:
    lines = [f"# {found.title}", "", " ".join(found.setting), ""]
    if found.base is not None:
        lines += [f"The base without training: {found.metric} {found.base:.4g}.", ""]
    for fraction in found.recommendations:
        if len(found.recommendations) > 1:
            lines += [f"## {fraction:g} of the training data", ""]
        header, rows = _rows(found, fraction)
        lines += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        *said, last = advice(found, fraction)
        lines += ["", *said]
        lines += ["", "```bash", last, "```", ""] if found.recommendations[fraction].chosen else [last, ""]
    if found.parts:
        lines += ["## Stopped early", ""]
        lines += [f"- {_stopped(p, found)}" for p in found.parts] + [""]
    if found.failures:
        lines += ["## Methods that failed", ""]
        lines += [f"- **{f.label}**{_of(f, found)}: {f.reason}" for f in found.failures]
        lines += [""]
    lines += [f"![{title}]({path.name})\n" for title, path in images]
    lines += ["## How this report was made", "", f"{found.minutes:.1f} minutes of wall time in all runs and searches."]
    lines += [f"{_hardware()}. {_versions()}.", ""]
    return "\n".join(lines)


def _stopped(part: Part, found: Findings) -> str:
    metric = f"{found.search_metric} {part.metric:.4g}"
    return f"**{part.label}**{_of(part, found)}: {metric} after {part.steps} steps with lr {part.values['lr']:.2g}"


def _of(failure: Failure | Part, found: Findings) -> str:
    return f" ({failure.fraction:g} of the data)" if len(found.recommendations) > 1 else ""


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    return f"{name} CPU, {torch.get_num_threads()} threads"


def _versions() -> str:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in found.items())
