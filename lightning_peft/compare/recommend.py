"""Choose the method to take from the results of a comparison.

The rule: candidates over the budget are left out. With ``keep``, the candidate with the fewest trainable parameters is
chosen among those that keep this fraction of full fine-tuning's quality. Otherwise the best candidates, equal within
noise, are found, and among them the one with the fewest trainable parameters is chosen. Two candidates are equal within
noise if their means differ by at most twice the standard error of the difference. The variance between seeds is pooled
over all candidates, because two or three seeds do not determine that of one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import attrs

from lightning_peft.compare.store import Result

__all__ = ["Budget", "Recommendation", "Summary", "recommend", "summarise"]

_FULL = "FullFineTuning"


@attrs.frozen
class Budget:
    """The user's limits for the recommended method.

    Attributes:
        max_params: the largest number of trainable parameters; None for no limit.
        max_minutes: the longest training; None for no limit.
        keep: the fraction of full fine-tuning's quality that suffices; None to look for the best. If higher values of
            the metric are better, it is a fraction of its value; otherwise, of its improvement over the base.
    """

    max_params: int | None = None
    max_minutes: float | None = None
    keep: float | None = None


@attrs.frozen
class Summary:
    """The mean over the seeds of one candidate.

    Attributes:
        error: the standard error of ``metric``, from the pooled variance between seeds; None if no candidate ran twice.
        runs: the results, one for each seed.
    """

    label: str
    method: str
    metric: float
    error: float | None
    runs: tuple[Result, ...]

    def mean(self, name: str) -> float | None:
        """The mean of an attribute of the runs; None if it was not measured."""
        values = [getattr(run, name) for run in self.runs]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return self.runs[0].trainable


@attrs.frozen
class Recommendation:
    """The chosen candidate, and the sentences that explain the choice; None if nothing is within the budget."""

    chosen: Summary | None
    reasons: list[str]
    equal: list[Summary] = attrs.field(factory=list)


def summarise(results: Sequence[Result], lower: bool) -> list[Summary]:
    """Average over seeds; the best candidate comes first.

    Args:
        results: of one fraction of the data.
        lower: whether lower values are better.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    repeated = [[run.metric for run in runs] for runs in groups.values() if len(runs) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    pooled = sum(statistics.variance(values) * (len(values) - 1) for values in repeated) / freedom if freedom else None
    found = [
        Summary(
            label,
            runs[0].method,
            statistics.fmean(run.metric for run in runs),
            None if pooled is None else math.sqrt(pooled / len(runs)),
            tuple(runs),
        )
        for label, runs in groups.items()
    ]
    return sorted(found, key=lambda summary: summary.metric if lower else -summary.metric)


def recommend(
    summaries: Sequence[Summary], budget: Budget, lower: bool, base: float | None = None, length: float = 1.0
) -> Recommendation:
    """Choose a candidate by the rule of this module.

    Args:
        summaries: from :func:`summarise`.
        budget: the limits.
        lower: whether lower values are better.
        base: the metric of the untrained base, for ``keep`` with a metric for which lower values are better.
        length: how many times longer the full training is than the compared runs.
    """
    if not summaries:
        return Recommendation(None, ["no candidate ran"])
    reasons: list[str] = []
    allowed = [s for s in summaries if _over(s, budget, length) is None]
    for summary in summaries:
        if (why := _over(summary, budget, length)) is not None:
            reasons.append(f"{summary.label} is over the budget: {why}")
    if not allowed:
        nearest = min(summaries, key=lambda s: s.trainable)
        return Recommendation(None, [*reasons, f"the smallest is {nearest.label}, {nearest.trainable:,} parameters"])
    if budget.keep is not None:
        return _keeping(summaries, allowed, budget.keep, lower, base, reasons)
    best = allowed[0]
    equal = [s for s in allowed if _within_noise(s, best)]
    chosen = min(equal, key=lambda s: (s.trainable, s.mean("step_ms") or 0.0))
    if chosen is best:
        reasons.insert(0, f"{best.label} has the best result, {_shown(best)}")
    else:
        reasons.insert(
            0,
            f"{chosen.label}, {_shown(chosen)}, equals the best, {best.label}, {_shown(best)}, within noise, and "
            f"trains {chosen.trainable:,} instead of {best.trainable:,} parameters",
        )
    others = [s for s in equal if s is not chosen]
    if best.error is None:
        reasons.append("every candidate ran with one seed, so the noise is unknown: give more --seeds")
    elif others:
        reasons.append(f"within noise of the best: {', '.join(f'{s.label} ({_shown(s)})' for s in others)}")
    else:
        reasons.append("no other candidate is within noise of it")
    return Recommendation(chosen, reasons, equal)


def _keeping(
    summaries: Sequence[Summary],
    allowed: Sequence[Summary],
    keep: float,
    lower: bool,
    base: float | None,
    reasons: list[str],
) -> Recommendation:
    full = next((s for s in summaries if s.method == _FULL), None)
    if full is None:
        return Recommendation(None, [*reasons, "--keep needs FullFineTuning among the methods, and it did not run"])
    if lower and base is None:
        return Recommendation(None, [*reasons, "--keep needs the base's metric, and the base could not be evaluated"])

    def kept(summary: Summary) -> float:
        if not lower:
            return summary.metric / full.metric if full.metric else math.inf
        assert base is not None
        gain = base - full.metric
        return (base - summary.metric) / gain if gain > 0 else (1.0 if summary.metric <= full.metric else 0.0)

    enough = [s for s in allowed if kept(s) >= keep]
    if not enough:
        best = allowed[0]
        text = f"nothing within the budget keeps {keep:.3g} of full fine-tuning; {best.label} keeps {kept(best):.3f}"
        return Recommendation(None, [text, *reasons])
    chosen = min(enough, key=lambda s: (s.trainable, s.mean("step_ms") or 0.0))
    reasons.insert(
        0,
        f"{chosen.label} has the fewest trainable parameters, {chosen.trainable:,}, of those that keep {keep:.3g} of "
        f"full fine-tuning: it keeps {kept(chosen):.3f} ({_shown(chosen)}, full fine-tuning {_shown(full)})",
    )
    unsure = [s for s in allowed if s not in enough and any(_within_noise(s, other) for other in enough)]
    if unsure:
        reasons.append(f"below it, but within noise: {', '.join(f'{s.label} ({kept(s):.3f})' for s in unsure)}")
    return Recommendation(chosen, reasons, enough)


def _over(summary: Summary, budget: Budget, length: float) -> str | None:
    minutes = (summary.mean("minutes") or 0.0) * length
    if budget.max_params is not None and summary.trainable > budget.max_params:
        return f"{summary.trainable:,} trainable parameters, at most {budget.max_params:,} are wanted"
    if budget.max_minutes is not None and minutes > budget.max_minutes:
        return f"about {minutes:.3g} minutes, at most {budget.max_minutes:g} are wanted"
    return None


def _within_noise(summary: Summary, best: Summary) -> bool:
    if summary is best:
        return True
    if summary.error is None or best.error is None:
        return False
    return abs(summary.metric - best.metric) <= 2 * math.hypot(summary.error, best.error)


def _shown(summary: Summary) -> str:
    return f"{summary.metric:.4g}" if summary.error is None else f"{summary.metric:.4g} ± {summary.error:.2g}"
