"""Write configurations, plots and metrics to loggers of every kind, with the functions that each logger has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_peft.core.record import InjectionState
from lightning_peft.trainer.logs import keys
from lightning_peft.trainer.logs.console import state_bytes
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["log_config", "log_figure", "log_metrics", "loggers_of", "logging_step"]


def loggers_of(loggers: Iterable[Any], kind: str) -> list[Any]:
    """Return the loggers of Lightning's class ``kind``, such as ``"WandbLogger"``, from either package."""
    return [logger for logger in loggers if isinstance(logger, lightning_classes(f"loggers.{kind}"))]


def _loggers(trainer: L.Trainer) -> list[Any]:
    """The loggers without their static type, because each kind has methods of its own."""
    return list(trainer.loggers)


def logging_step(trainer: L.Trainer) -> int:
    """The step under which Lightning logs the values of this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_config(trainer: L.Trainer, model: nn.Module, record: InjectionState) -> None:
    """Log the methods' configurations and the parameter counts to every logger. Only rank 0 may call this."""
    if not trainer.loggers:
        return
    report, (trained, full) = record.report, state_bytes(model)
    values = {
        keys.METHODS: {name: {"method": type(m).__name__, **m.config()} for name, m in record.methods.items()},
        keys.TRAINABLE: report.trainable,
        keys.TOTAL: report.total,
        keys.PERCENT: report.percent,
        keys.TRAINABLE_BYTES: trained,
        keys.TOTAL_BYTES: full,
    }
    config = {keys.CONFIG: {key.name: value for key, value in values.items()}}
    flat = flattened(config)
    for logger in _loggers(trainer):
        of_mlflow = bool(loggers_of([logger], "MLFlowLogger"))
        logger.log_hyperparams(_without_changed(logger, flat) if of_mlflow else config)
        # TensorBoard's HParams page shows only the first of several calls, which is Lightning's own.
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_text"):
            rows = "\n".join(f"| {name} | {value} |" for name, value in flat.items())
            experiment.add_text(keys.CONFIG, f"| name | value |\n|---|---|\n{rows}")


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings with ``/``, as Lightning's loggers do."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping)
        found.update(flattened(value, f"{prefix}{key}/") if inner else {f"{prefix}{key}": value})
    return found


def _without_changed(logger: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out parameters that have a different value in the MLflow run, because MLflow refuses to change them."""
    known = logger.experiment.get_run(logger.run_id).data.params
    changed = [name for name, value in config.items() if known.get(name, str(value)[:250]) != str(value)[:250]]
    if changed:
        rank_zero_info(f"MLflow keeps the first value of {', '.join(changed)}, because parameters of a run are final")
    return {name: value for name, value in config.items() if name not in changed}


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Log values to every logger under Lightning's current step. Only rank 0 may call this."""
    for logger in _loggers(trainer) if metrics else ():
        logger.log_metrics(dict(metrics), step=logging_step(trainer))


def log_figure(trainer: L.Trainer, name: str, figure: Any) -> None:
    """Log a figure to every logger; one without images gets a PNG in its folder. Only rank 0 may call this."""
    step = logging_step(trainer)
    for logger in _loggers(trainer):
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(name, [figure])
        elif hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, step, close=False)
        elif loggers_of([logger], "MLFlowLogger"):
            experiment.log_figure(logger.run_id, figure, f"{name}.png")
        elif folder := getattr(logger, "log_dir", None):
            path = Path(folder) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        else:
            rank_zero_info(f"{type(logger).__name__} takes no images and has no folder, so {name} is not plotted")
