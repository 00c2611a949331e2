"""Search the learning rate and the arguments of one candidate with Optuna.

The first trials try the learning rates start, 3 start, start / 3, ... until both neighbours of the best one are worse.
The next trials combine each remaining choice of each argument with the best values so far. Optuna's TPE sampler chooses
the rest. A successive halving pruner stops trials that are among the worse half after a third or two thirds of the
steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_peft.compare.candidates import Candidate, Choices, Range

__all__ = ["open_storage", "search"]

#: trains a candidate with some values, and reports intermediate results; returns the final one
Objective = Callable[[dict[str, Any], Callable[[int, float], None]], float]


def open_storage(path: Path) -> JournalStorage:
    """The file that keeps all searches of a comparison; ``optuna-dashboard`` opens it."""
    logging.getLogger("optuna").setLevel(logging.WARNING)
    return JournalStorage(JournalFileBackend(str(path)))


def search(
    candidate: Candidate, name: str, storage: JournalStorage, trials: int, lower: bool, objective: Objective
) -> tuple[dict[str, Any], float]:
    """Run the trials that are missing, and return the best values and their result.

    Args:
        candidate: what is searched.
        name: the name of its study in ``storage``. Only one process may search it at a time.
        trials: how many trials have a result in the end, pruned ones included.
        lower: whether lower results are better.
        objective: trains and evaluates.

    Raises:
        Exception: if every trial failed; it is the error of the last one.
    """
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="minimize" if lower else "maximize",
        sampler=TPESampler(seed=0, n_startup_trials=3, multivariate=True),
        pruner=SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        load_if_exists=True,
    )
    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # trials of a process that was killed
        study.tell(left.number, state=TrialState.FAIL)
        study.enqueue_trial(left.params)
    error: Exception | None = None
    failures = 0
    trials = trials if candidate.searched else 1
    while len(_finished(study)) < trials and failures < trials:
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            rate = _next_rate(candidate, study, lower)
            following = _next_choice(candidate, study, lower) if rate is None else {"lr": rate, **_defaults(candidate)}
            if following is not None:
                study.enqueue_trial(following)
        trial = study.ask()
        values = _suggest(candidate, trial)
        try:
            result = objective(values, _Reporter(trial))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
            continue
        except Exception as failed:
            study.tell(trial, state=TrialState.FAIL)
            error, failures = failed, failures + 1
            if not _finished(study):
                break  # the candidate does not run at all, so other rates would not help
            continue
        # A loss that is not finite is worse than any, but it is a result.
        study.tell(trial, result if isfinite(result) else (math.inf if lower else -math.inf))
    best = _best(study, lower)
    if best is None:
        raise error or RuntimeError("no trial gave a finite result at any learning rate")
    assert best.value is not None
    return dict(best.user_attrs["values"]), best.value


class _Reporter:
    """Reports an intermediate result, and stops a trial that is behind.

    Raises:
        TrialPruned: if the trial is among the worse half.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial, self._count = trial, 0

    def __call__(self, step: int, value: float) -> None:
        self._count += 1
        if not isfinite(value):
            return
        self._trial.report(value, 2 ** (self._count - 1))
        if self._trial.should_prune():
            raise optuna.TrialPruned


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _best(study: optuna.Study, lower: bool) -> FrozenTrial | None:
    sign = 1 if lower else -1
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finite = [(sign * t.value, t.number, t) for t in complete if t.value is not None and isfinite(t.value)]
    return min(finite)[2] if finite else None


def _defaults(candidate: Candidate) -> dict[str, Any]:
    """The middle of every range, with which the first trials look for the learning rate."""
    found: dict[str, Any] = {}
    for name, values in candidate.ranges.items():
        if isinstance(values, Choices):
            options = _options(values)
            found[name] = options[len(options) // 2]
        else:
            middle = math.sqrt(values.low * values.high) if values.log else (values.low + values.high) / 2
            found[name] = round(middle) if _whole(values) else middle
    return found


def _next_choice(candidate: Candidate, study: optuna.Study, lower: bool) -> dict[str, Any] | None:
    """The best values so far with one choice that no trial had yet; None if every choice was tried."""
    best = _best(study, lower)
    for name, values in candidate.ranges.items() if best is not None else ():
        tried = [trial.params.get(name) for trial in _finished(study)]
        for option in _options(values) if isinstance(values, Choices) else ():
            if option not in tried:
                return {**best.params, name: option}  # type: ignore[union-attr]
    return None


def _options(choices: Choices) -> list[Any]:
    """The choices for Optuna: the values, or their positions if some are lists, which Optuna cannot store."""
    plain = all(isinstance(value, str | int | float | bool | None) for value in choices.values)
    return list(choices.values) if plain else list(range(len(choices.values)))


def _whole(values: Range) -> bool:
    return isinstance(values.low, int) and isinstance(values.high, int)


def _suggest(candidate: Candidate, trial: Trial) -> dict[str, Any]:
    rates = candidate.rates
    values: dict[str, Any] = {}
    if rates.low < rates.high:
        values["lr"] = trial.suggest_float("lr", rates.low, rates.high, log=True)
    else:
        values["lr"] = rates.low
    for name, found in candidate.ranges.items():
        if isinstance(found, Choices):
            options = _options(found)
            values[name] = found.values[options.index(trial.suggest_categorical(name, options))]
        elif _whole(found):
            values[name] = trial.suggest_int(name, int(found.low), int(found.high), log=found.log)
        else:
            values[name] = trial.suggest_float(name, found.low, found.high, log=found.log)
    trial.set_user_attr("values", values)
    return values


def _next_rate(candidate: Candidate, study: optuna.Study, lower: bool) -> float | None:
    """The next learning rate of the walk; None if both neighbours of the best are tried, or out of range."""
    rates = candidate.rates
    if rates.low == rates.high:
        return None
    results: dict[int, float] = {}
    for trial in _finished(study):
        place = 2 * math.log10(trial.params["lr"] / candidate.start)
        if abs(place - round(place)) > 1e-3:
            continue  # chosen by the sampler
        value = trial.value if trial.state == TrialState.COMPLETE else None
        if value is not None and not lower:
            value = -value
        worst = math.inf if value is None or not isfinite(value) else value
        results[round(place)] = min(worst, results.get(round(place), math.inf))
    if not results:
        return candidate.start
    best = min(results, key=lambda place: results[place])
    if results[best] == math.inf:
        best = min(results)  # nothing is finite yet: go down
        order = [best - 1]
    else:
        order = [best + 1, best - 1]
    for place in order:
        rate = candidate.start * 10 ** (place / 2)
        if place not in results and rates.low <= rate <= rates.high:
            return rate
    return None
