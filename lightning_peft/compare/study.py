"""The work of a comparison, in pieces that processes share: searches, one run of every candidate, further seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from lightning_peft.compare.candidates import Candidate
from lightning_peft.compare.run import Runner, first_line
from lightning_peft.compare.store import Failure, Part, Result, Store

__all__ = ["Plan", "Study", "Unit"]


@attrs.frozen
class Plan:
    """The plan of a comparison: what to train, and how much.

    Attributes:
        candidates: what is compared.
        steps: optimizer steps of each run.
        search_steps: optimizer steps of each trial of a search.
        trials: trials of each search; 0 uses the usual learning rate of each method.
        seeds: the seeds of the finalists; every candidate runs with the first one.
        finalists: how many candidates run with the other seeds; full fine-tuning runs with them too.
        fractions: parts of the training data, each compared separately.
        halving: run the first quarter of the steps only with the better half of the candidates, by their searches, and
            all steps only with the finalists.
    """

    candidates: Sequence[Candidate]
    steps: int
    search_steps: int
    trials: int
    seeds: Sequence[int]
    finalists: int
    fractions: Sequence[float] = (1.0,)
    halving: bool = False

    @property
    def part_steps(self) -> int:
        """The steps after which the candidates are ranked that are not finalists."""
        return max(1, self.steps // 4)


@attrs.frozen
class Unit:
    """One piece of work: the search of a candidate, or with a seed, one run of it, or with steps its first part."""

    candidate: Candidate
    fraction: float
    seed: int | None = None
    steps: int | None = None

    @property
    def key(self) -> str:
        """The name of the piece of work on disk."""
        part = "search" if self.seed is None else f"seed{self.seed}"
        end = "" if self.steps is None else f"-to{self.steps}"
        return f"{self.candidate.key}-{self.fraction:g}-{part}{end}"

    def __str__(self) -> str:
        part = "search" if self.seed is None else f"seed {self.seed}"
        part += "" if self.steps is None else f", {self.steps} steps"
        fraction = "" if self.fraction == 1 else f", {self.fraction:.3g} of the data"
        return f"{self.candidate.label}: {part}{fraction}"


class Study:
    """Does the work of a plan that is not done yet, together with other processes on the same folder.

    Args:
        plan: what to train.
        runner: trains one candidate.
        store: the folder.
    """

    def __init__(self, plan: Plan, runner: Runner, store: Store) -> None:
        self.plan, self.runner, self.store = plan, runner, store

    def run(self, progress: Callable[[Unit, str], None] | None = None, wait: float = 1.0) -> None:
        """Work until everything is done, by this or by other processes.

        Args:
            progress: called with a piece of work and ``"start"``, ``"done"`` or the reason of a failure.
            wait: seconds between checks of work that other processes hold.
        """
        tell = progress or (lambda unit, what: None)
        while True:
            left = [unit for unit in self.units() if self.store.get(unit.key) is None]
            if not left:
                return
            if not any(self._attempt(unit, tell) for unit in left):  # the first that no other process holds
                time.sleep(wait)

    def units(self) -> Iterator[Unit]:
        """The work that is known so far, in order; further seeds follow once every candidate has run."""
        for fraction in self.plan.fractions:
            alive = [c for c in self.plan.candidates if not isinstance(self._outcome(c, fraction), Failure)]
            for candidate in alive:
                yield Unit(candidate, fraction)
            ready = [c for c in alive if self.store.get(Unit(c, fraction).key) is not None]
            if self.plan.halving:
                parts, ready = self._halve(fraction)
                yield from parts
            for candidate in ready:
                yield Unit(candidate, fraction, self.plan.seeds[0])
            for seed in self.plan.seeds[1:]:
                for candidate in self._finalists(fraction):
                    yield Unit(candidate, fraction, seed)

    def parts(self) -> list[Part]:
        """The runs that stopped early and did not continue, the best first for each fraction of the data."""
        left: list[Part] = []
        for fraction in self.plan.fractions if self.plan.halving else ():
            parts, finalists = self._halve(fraction)
            found = [self.store.get(unit.key) for unit in parts if unit.candidate not in finalists]
            left += sorted((p for p in found if isinstance(p, Part)), key=lambda p: self._rank(p.metric))
        return left

    def _halve(self, fraction: float) -> tuple[list[Unit], list[Candidate]]:
        """The first parts of runs, and the candidates that run to the end; empty while it is not known which."""
        outcomes: list[Any] = [self.store.get(Unit(c, fraction).key) for c in self.plan.candidates]
        if any(outcome is None for outcome in outcomes):
            return [], []
        searched = [(c, o) for c, o in zip(self.plan.candidates, outcomes) if not isinstance(o, Failure)]
        if self.plan.trials:
            searched.sort(key=lambda pair: self._rank(pair[1]["metric"]))
            searched = searched[: max(math.ceil(len(searched) / 2), self.plan.finalists)]
        parts = [Unit(c, fraction, self.plan.seeds[0], self.plan.part_steps) for c, _ in searched]
        found: list[Any] = [self.store.get(unit.key) for unit in parts]
        if any(part is None for part in found):
            return parts, []
        ran = [(unit.candidate, part) for unit, part in zip(parts, found) if isinstance(part, Part)]
        ran.sort(key=lambda pair: self._rank(pair[1].metric))
        return parts, [c for c, _ in ran[: self.plan.finalists]]

    def _rank(self, metric: float) -> float:
        """A number that is lower for a better metric of the search."""
        if not math.isfinite(metric):
            return math.inf
        return metric if self.runner.metric.search_lower else -metric

    def results(self) -> list[Result]:
        """Every finished run."""
        found = [
            self.store.get(Unit(candidate, fraction, seed).key)
            for fraction in self.plan.fractions
            for candidate in self.plan.candidates
            for seed in self.plan.seeds
        ]
        return [result for result in found if isinstance(result, Result)]

    def failures(self) -> list[Failure]:
        """The candidates that could not run."""
        pairs = [(c, f) for f in self.plan.fractions for c in self.plan.candidates]
        return [found for c, f in pairs if isinstance(found := self._outcome(c, f), Failure)]

    def done(self) -> int:
        """The number of pieces of work that are done."""
        return sum(self.store.get(unit.key) is not None for unit in self.units())

    def minutes(self) -> float:
        """The wall time of all runs and searches, by whichever process."""
        outcomes: list[Any] = [self.store.get(unit.key) for unit in self.units() if unit.steps is None]
        done = sum(o.minutes for o in [*outcomes, *self.parts()] if isinstance(o, Result | Part))
        return done + sum(o.get("minutes", 0.0) for o in outcomes if isinstance(o, dict))

    def describe(self, unit: Unit) -> str:
        """A line about a finished piece of work."""
        outcome: Any = self.store.get(unit.key)
        if isinstance(outcome, Result):
            return f"{unit}: {self.runner.metric.final} {outcome.metric:.4g}, {outcome.minutes:.2g} min"
        if isinstance(outcome, Part):
            return f"{unit}: {self.runner.metric.search} {outcome.metric:.4g}, {outcome.minutes:.2g} min"
        values = ", ".join(f"{n} {v:.2g}" if isinstance(v, float) else f"{n} {v}" for n, v in outcome["values"].items())
        return f"{unit}: {values}"

    def _outcome(self, candidate: Candidate, fraction: float) -> Any:
        """The failure of a candidate; otherwise the outcome of its first run, if there is one."""
        units = [Unit(candidate, fraction), *(Unit(candidate, fraction, seed) for seed in self.plan.seeds)]
        if self.plan.halving:
            units.append(Unit(candidate, fraction, self.plan.seeds[0], self.plan.part_steps))
        found = [self.store.get(unit.key) for unit in units]
        return next((outcome for outcome in found if isinstance(outcome, Failure)), found[1])

    def _finalists(self, fraction: float) -> list[Candidate]:
        """The candidates with the best first run; empty until every candidate has run."""
        candidates = self._halve(fraction)[1] if self.plan.halving else self.plan.candidates
        outcomes = {c.label: self._outcome(c, fraction) for c in candidates}
        if any(outcome is None for outcome in outcomes.values()):
            return []
        ran = [c for c in candidates if isinstance(outcomes[c.label], Result)]
        ran.sort(key=lambda c: outcomes[c.label].metric * (1 if self.runner.metric.lower else -1))
        chosen = ran[: self.plan.finalists]
        return [c for c in ran if c in chosen or c.method == "FullFineTuning"]

    def _attempt(self, unit: Unit, tell: Callable[[Unit, str], None]) -> bool:
        """Do a piece of work, unless another process is doing it or has done it. Returns whether it was done here."""
        with self.store.claim(unit.key) as held:
            if not held:
                return False
            if self.store.get(unit.key) is not None:
                return True
            tell(unit, "start")
            try:
                outcome: Result | Part | Mapping[str, Any] = self._do(unit)
            except Exception as error:
                reason = first_line(error)
                self.store.put(unit.key, Failure(unit.candidate.label, unit.candidate.method, unit.fraction, reason))
                tell(unit, reason)
                return True
            self.store.put(unit.key, outcome)
            tell(unit, "done")
            return True

    def _do(self, unit: Unit) -> Result | Part | Mapping[str, Any]:
        candidate, fraction, plan = unit.candidate, unit.fraction, self.plan
        if unit.seed is not None:
            searched: Any = self.store.get(Unit(candidate, fraction).key)
            run = (candidate, searched["values"], plan.steps, fraction, unit.seed)
            if unit.steps is not None:
                return self.runner.part(*run, unit.steps, self.store.state(unit.key))
            if not plan.halving:
                return self.runner.final(*run)
            self._drop_states(fraction)
            state = self.store.state(Unit(candidate, fraction, unit.seed, plan.part_steps).key)
            result = self.runner.final(*run, state)
            state.unlink(missing_ok=True)
            return result
        if not plan.trials or not (candidate.searched or plan.halving):
            return {"values": {"lr": candidate.start}}
        from lightning_peft.compare.search import open_storage, search

        def objective(values: dict[str, Any], report: Callable[[int, float], None]) -> float:
            # Validating trials of a few steps more than once would cost more than stopping the worse half saves.
            return self.runner.search(candidate, values, plan.search_steps, fraction, None if plan.halving else report)

        start = time.perf_counter()
        storage = open_storage(self.store.journal)
        values, metric = search(candidate, unit.key, storage, plan.trials, self.runner.metric.search_lower, objective)
        return {"values": values, "metric": metric, "minutes": (time.perf_counter() - start) / 60}

    def _drop_states(self, fraction: float) -> None:
        """Delete the states of runs that do not continue; those of large models are large."""
        parts, finalists = self._halve(fraction)
        for unit in parts:
            if unit.candidate not in finalists:
                self.store.state(unit.key).unlink(missing_ok=True)
