"""Draw a comparison: the metric against parameters, time and memory; learning curves; the metric against forgetting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from lightning_peft.compare.recommend import Summary, summarise

if TYPE_CHECKING:
    from lightning_peft.compare.report import Findings

__all__ = ["draw", "pareto_front"]

_COSTS = {"trainable": "trainable parameters", "step_ms": "ms per step", "peak_mb": "peak memory, MB"}


def draw(found: Findings, folder: Path) -> list[tuple[str, Path]]:
    """Write the plots to ``folder``.

    Returns:
        The title and the path of each plot.
    """
    matplotlib.use("agg")
    written = []
    for fraction in found.recommendations:
        summaries = summarise([r for r in found.results if r.fraction == fraction], found.lower)
        if not summaries:
            continue
        end = "" if fraction == 1 else f"-{fraction:g}"
        written.append((f"{found.metric} against cost", _draw_costs(found, summaries, folder / f"costs{end}.png")))
        written.append(("learning curves", _draw_curves(summaries, folder / f"curves{end}.png")))
        if any(s.mean("divergence") is not None for s in summaries):
            path = folder / f"retention{end}.png"
            written.append((f"{found.metric} against retention", _draw_retention(found, summaries, path)))
    if len(found.recommendations) > 1:
        written.append((f"{found.metric} against data", _draw_fractions(found, folder / "fractions.png")))
    return written


def pareto_front(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The points (cost, metric) for which no other has a better metric at the same or a lower cost, by cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not front or (value < front[-1][1] if lower else value > front[-1][1]):
            front.append((cost, value))
    return front


def _draw_costs(found: Findings, summaries: Sequence[Summary], path: Path) -> Path:
    def fill(figure: Any) -> None:
        for axes, (name, shown) in zip(figure.subplots(1, 3, sharey=True), _COSTS.items()):
            points = [(float(s.mean(name) or 0.0), s.metric) for s in summaries]
            for (cost, value), s in zip(points, summaries):
                axes.errorbar(cost, value, yerr=s.error, fmt="o", color="C0", markersize=4)
                axes.annotate(s.label, (cost, value), xytext=(4, 3), textcoords="offset points", fontsize=6)
            front = pareto_front(points, found.lower)
            axes.step(*zip(*front), where="post", color="C1", linewidth=1, label="Pareto front")
            axes.set_xlabel(shown)
            if name == "trainable":
                axes.set_xscale("log")
                axes.set_ylabel(f"{found.metric} ({'lower' if found.lower else 'higher'} is better)")
                axes.legend(fontsize=7)

    return _figure(path, (14, 4.2), fill)


def _draw_curves(summaries: Sequence[Summary], path: Path) -> Path:
    def fill(figure: Any) -> None:
        axes = figure.subplots()
        for i, s in enumerate(summaries):
            steps = zip(*s.runs[0].losses)
            axes.plot(*steps, label=s.label, linewidth=1, linestyle=("-", "--", ":")[i // 10 % 3])
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.legend(fontsize=6, ncols=2)

    return _figure(path, (7, 4.2), fill)


def _draw_retention(found: Findings, summaries: Sequence[Summary], path: Path) -> Path:
    def fill(figure: Any) -> None:
        axes = figure.subplots()
        for i, s in enumerate(summaries):
            divergence = s.mean("divergence")
            if divergence is None:
                continue
            axes.plot(divergence, s.metric, "o", color=f"C{i % 10}", markersize=4)
            axes.annotate(s.label, (divergence, s.metric), xytext=(4, 3), textcoords="offset points", fontsize=6)
            if s.runs[0].scales:  # lp.scale between the base and the adapter
                _, metrics, divergences = zip(*sorted(s.runs[0].scales))
                axes.plot(divergences, metrics, color=f"C{i % 10}", linewidth=0.8)
        axes.set_xlabel(
            f"{'KL divergence' if found.distance == 'kl' else found.distance} from the base on the retention data"
        )
        axes.set_ylabel(found.metric)

    return _figure(path, (7, 4.2), fill)


def _draw_fractions(found: Findings, path: Path) -> Path:
    def fill(figure: Any) -> None:
        axes = figure.subplots()
        labels = dict.fromkeys(result.label for result in found.results)
        by_fraction = {
            f: {s.label: s.metric for s in summarise([r for r in found.results if r.fraction == f], found.lower)}
            for f in sorted(found.recommendations)
        }
        for i, label in enumerate(labels):
            points = [(f, values[label]) for f, values in by_fraction.items() if label in values]
            axes.plot(*zip(*points), marker="o", markersize=3, label=label, linestyle=("-", "--", ":")[i // 10 % 3])
        axes.set_xscale("log")
        axes.set_xlabel("part of the training data")
        axes.set_ylabel(found.metric)
        axes.legend(fontsize=6, ncols=2)

    return _figure(path, (7, 4.2), fill)


def _figure(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> Path:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size)
    fill(figure)
    figure.savefig(path, bbox_inches="tight", dpi=110)
    pyplot.close(figure)
    return path
