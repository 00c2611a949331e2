"""Train one candidate once, and measure it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import lightning as L
import torch

import lightning_peft as lp
from lightning_peft.compare.candidates import Candidate
from lightning_peft.compare.fractions import keep_batches, keep_fraction
from lightning_peft.compare.measure import checkpoint_size, clock, peak_memory, quiet, reset_peak
from lightning_peft.compare.part import StopAt
from lightning_peft.compare.store import Part, Result
from lightning_peft.pretrained import InputError

__all__ = ["Builder", "Built", "Metric", "Runner", "first_line", "minimised"]

_LOWER_IS_BETTER = ("loss", "error", "mae", "mse", "rmse", "perplexity", "wer", "cer", "nll")
_CURVE_POINTS = 40
_MIN_BATCHES = 8


@attrs.frozen
class Built:
    """A Trainer with a module and its data, ready to fit."""

    trainer: L.Trainer
    module: L.LightningModule
    data: L.LightningDataModule | None


class Builder(Protocol):
    """Builds a run from the base configuration.

    Args:
        flags: arguments of ``lightning-peft fit``, after those of the base.
        callbacks: added to the configuration's own callbacks.
        trainer: arguments of the Trainer that replace those of the configuration.
        name: the run's name in W&B, if the configuration logs there; None to log nothing.
    """

    def __call__(
        self,
        flags: Sequence[str],
        callbacks: Sequence[L.Callback],
        trainer: Mapping[str, Any],
        name: str | None = None,
    ) -> Built: ...


@attrs.frozen
class Metric:
    """The metric that is compared.

    Attributes:
        name: the name under which the module logs it in validation, such as ``"val/acc"``.
        lower: whether lower values are better.
        test: measure finished runs on the test split; the name then has ``test`` in place of ``val``.
        search: the metric that the search for rates looks at, in validation.
        search_lower: whether lower values of that metric are better.
    """

    name: str
    lower: bool
    test: bool
    search: str
    search_lower: bool

    @property
    def final(self) -> str:
        """The name in the evaluation of a finished run."""
        return self.name.replace("val", "test", 1) if self.test else self.name


def minimised(name: str) -> bool:
    """Whether lower values of a metric of this name are better."""
    last = name.replace("_", "/").split("/")
    return any(part in _LOWER_IS_BETTER for part in last)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__


class Runner:
    """Trains candidates under equal conditions.

    Args:
        build: builds a run from the base configuration.
        rate_flag: the argument of ``fit`` that sets the learning rate, such as ``"--model.lr"``.
        metric: the compared metric.
        retention: creates the callback that measures forgetting in one run; None without retention data.
        scales: the factors of ``lp.scale`` at which finished runs are evaluated again.
    """

    def __init__(
        self,
        build: Builder,
        rate_flag: str,
        metric: Metric,
        retention: Callable[[], Any] | None = None,
        scales: Sequence[float] = (),
    ) -> None:
        self.build, self.rate_flag, self.metric = build, rate_flag, metric
        self.retention, self.scales = retention, scales

    def flags(self, candidate: Candidate, values: Mapping[str, Any]) -> list[str]:
        """The arguments of ``fit`` that train the candidate with ``values``."""
        return [*candidate.flags(values), f"{self.rate_flag}={values['lr']:.6g}"]

    def search(
        self,
        candidate: Candidate,
        values: Mapping[str, Any],
        steps: int,
        fraction: float,
        report: Callable[[int, float], None] | None = None,
    ) -> float:
        """Train for a few steps, and return the metric of the search; nan if the loss is not finite.

        Args:
            report: called with a step and the metric then, after a third and two thirds of the steps; it may raise
                an exception to stop the run. None evaluates only once, at the end.
        """
        name = self.metric.search
        watch = _Watch(name, report)
        built = self._fit(self.flags(candidate, values), steps, 0, fraction, [watch], once=None if report else steps)
        if watch.diverged:
            return math.nan
        return _value(_evaluate(built, False), name)

    def part(
        self,
        candidate: Candidate,
        values: Mapping[str, Any],
        steps: int,
        fraction: float,
        seed: int,
        stop: int,
        state: Path,
    ) -> Part:
        """Train the first steps of a run, and keep its state.

        Args:
            steps: the steps of the whole run, on which schedules of the learning rate depend.
            stop: the steps after which it stops.
            state: the file from which :meth:`final` continues.
        """
        name = self.metric.search
        watch, end = _Watch(name), StopAt(stop, state)
        built = self._fit(self.flags(candidate, values), steps, seed, fraction, [watch, end], once=stop)
        metric = math.nan
        if not watch.diverged:
            end.average(built.module)
            metric = _value(_evaluate(built, False), name)
        return Part(candidate.label, fraction, stop, metric, watch.wall / 60, dict(values))

    def final(
        self,
        candidate: Candidate,
        values: Mapping[str, Any],
        steps: int,
        fraction: float,
        seed: int,
        state: Path | None = None,
    ) -> Result:
        """Train for all steps, and measure everything.

        Args:
            state: the file of a :meth:`part` of this run, which then continues; if it is not there, the run starts
                at the first step.

        Raises:
            InputError: if the loss is not finite.
        """
        watch, retention = _Watch(self.metric.name), self.retention() if self.retention is not None else None
        flags = self.flags(candidate, values)
        callbacks = [watch, *([retention] if retention is not None else [])]
        name = f"{candidate.label}-seed{seed}-{fraction:g}"
        built = self._fit(flags, steps, seed, fraction, callbacks, name, state=state)
        if watch.diverged:
            raise InputError("the loss became infinite or NaN: lower the learning rate")
        metrics = _evaluate(built, self.metric.test)
        metric = _value(metrics, self.metric.final)
        # A measurement replaces the last one, so the values of the unscaled adapter are read first.
        forgot = dict(retention.last) if retention is not None else {}
        scales = self._scaled(built, retention, metric) if seed == 0 else []
        for logger in built.trainer.loggers:  # W&B continues a run until it is finished
            getattr(getattr(logger, "experiment", None), "finish", lambda: None)()
        return Result(
            label=candidate.label,
            method=candidate.method,
            fraction=fraction,
            seed=seed,
            metric=metric,
            trainable=sum(p.numel() for p in lp.trainable_parameters(built.module)),
            total=sum(p.numel() for p in built.module.parameters()),
            step_ms=1e3 * statistics.median(watch.seconds),
            peak_mb=watch.peak / 1e6,
            checkpoint_mb=checkpoint_size(built.trainer) / 1e6,
            forgetting_loss=forgot.get("loss_change"),
            divergence=forgot.get(retention.distance) if retention is not None else None,
            minutes=watch.wall / 60,
            values=dict(values),
            flags=flags,
            metrics=metrics,
            losses=watch.loss_curve(),
            curve=watch.metrics,
            scales=scales,
        )

    def base(self) -> tuple[Built, float | None, int]:
        """Build the base without a method.

        Returns:
            The base, its metric (None if it cannot be evaluated), and the number of optimizer steps of a whole fit.
        """
        with quiet():
            built = self.build(["--seed_everything=0"], [], _QUIET)
            if self.retention is not None:
                self.retention().check(built.module)
            try:
                metric = _value(_evaluate(built, self.metric.test), self.metric.final)
            except InputError:
                raise
            except Exception:  # for example because its head has another size; candidates may still run
                metric = None
            return built, metric, _steps(built)

    def _fit(
        self,
        flags: Sequence[str],
        steps: int,
        seed: int,
        fraction: float,
        callbacks: Sequence[L.Callback],
        name: str | None = None,
        once: int | None = None,
        state: Path | None = None,
    ) -> Built:
        gc.collect()
        with quiet():
            length = {"max_steps": steps, "max_epochs": -1, "check_val_every_n_epoch": None}
            stops = any(isinstance(callback, StopAt) for callback in callbacks)
            options = {**_QUIET, **length, "enable_checkpointing": stops}
            built = self.build([*flags, f"--seed_everything={seed}"], callbacks, options, name)
            interval = steps // 3 + 1 if once is None else steps + 1
            built.trainer.val_check_interval = interval * built.trainer.accumulate_grad_batches
            source: Any = built.module if built.data is None else built.data
            keep_fraction(source, fraction)
            if once is not None:  # a run that is validated once, after so many steps: for less time than it trained
                keep_batches(source, max(_MIN_BATCHES, once))
            start = state if state is not None and state.exists() else None
            built.trainer.fit(built.module, datamodule=built.data, ckpt_path=start)
        return built

    def _scaled(self, built: Built, retention: Any, metric: float) -> list[tuple[float, float, float]]:
        """The metric and the divergence for each factor of ``lp.scale``; empty if the method cannot be scaled."""
        if retention is None or not self.scales:
            return []
        found = [(1.0, metric, retention.last[retention.distance])]
        try:
            for factor in self.scales:
                with lp.scale(built.module, "default", factor):
                    value = _value(_evaluate(built, self.metric.test), self.metric.final)
                    found.append((factor, value, retention.measure(built.trainer, built.module)[retention.distance]))
        except ValueError:  # such as a prefix, and methods that train the base in place
            return []
        return found


def _steps(built: Built) -> int:
    """The number of optimizer steps of a fit of the base configuration."""
    trainer, source = built.trainer, built.module if built.data is None else built.data
    if trainer.max_steps != -1:
        return trainer.max_steps
    source.setup("fit")
    batches = len(source.train_dataloader())
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    return math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)


#: a Trainer that leaves no files and prints nothing
_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def _evaluate(built: Built, test: bool) -> dict[str, float]:
    """Every metric that the module logs on the validation or test split."""
    with quiet():
        run = built.trainer.test if test else built.trainer.validate
        found = run(built.module, datamodule=built.data, verbose=False)
    return {name: float(value) for part in found for name, value in part.items()}


def _value(metrics: Mapping[str, Any], name: str) -> float:
    if name not in metrics:
        raise InputError(f"the module does not log {name!r} in this evaluation; it logs {', '.join(sorted(metrics))}")
    return float(metrics[name])


class _Watch(L.Callback):
    """Measures the steps of a fit, and stops it if the loss is not finite.

    Args:
        name: the metric to record after each validation.
        report: called with the step and that metric.
    """

    def __init__(self, name: str, report: Callable[[int, float], None] | None = None) -> None:
        self.metrics: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.wall = 0.0
        self.peak = 0
        self.diverged = False
        self._name, self._report = name, report
        self._start = self._wall_start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reset_peak(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._wall_start, self._start = time.perf_counter(), clock(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.seconds.append(clock(pl_module.device) - self._start)
        self.wall += time.perf_counter() - self._wall_start
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self.losses.append(float(loss.detach()))
            if not math.isfinite(self.losses[-1]):
                self.diverged = trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.peak = peak_memory(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not self.diverged:
            self.metrics.append((trainer.global_step, _value(trainer.callback_metrics, self._name)))
            if self._report is not None:
                self._report(*self.metrics[-1])

    def state_dict(self) -> dict[str, Any]:  # a run that continues reports all of its steps
        return {"seconds": self.seconds, "losses": self.losses, "metrics": self.metrics, "wall": self.wall}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def loss_curve(self) -> list[tuple[int, float]]:
        """The training loss, averaged over equal intervals."""
        size = max(1, math.ceil(len(self.losses) / _CURVE_POINTS))
        starts = range(0, len(self.losses), size)
        return [(i + size // 2, statistics.fmean(self.losses[i : i + size])) for i in starts]
