"""Upload the adapters of a fit to the loggers that store artifacts: W&B and MLflow."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_peft.core.targeting.base_model import base_of
from lightning_peft.core.targeting.base_modules import holds_shards
from lightning_peft.trainer.checkpoints.manifest import manifest
from lightning_peft.trainer.logs.loggers import loggers_of

__all__ = ["adapter_writers", "log_adapters"]

#: functions that write all adapters of a model to a folder; the formats register theirs here
adapter_writers: list[Callable[[nn.Module, str], object]] = []


def log_adapters(trainer: L.Trainer, model: nn.Module, say: bool = True) -> None:
    """Upload the adapters to W&B and MLflow, as a directory that ``lp.load_adapter`` reads.

    W&B gets a new version of the artifact ``adapter-<run id>``, and MLflow a folder ``adapters/step-<n>`` of the run.
    Both get the name and the fingerprint of the base. In online mode, the base is also an input of the W&B run. All
    ranks must call this, because writing a sharded model gathers its tensors.

    Args:
        trainer: the Trainer whose loggers get the adapters.
        model: the trained model.
        say: log a line about each logger that stores no artifacts.
    """
    takes = {id(logger) for kind in ("WandbLogger", "MLFlowLogger") for logger in loggers_of(trainer.loggers, kind)}
    for logger in trainer.loggers if say else ():
        if id(logger) not in takes:
            rank_zero_info(
                f"{type(logger).__name__} stores no artifacts: the adapters are only in checkpoints, and "
                "`lightning-peft export` makes a directory of one"
            )
    if not takes or not (trainer.is_global_zero or holds_shards(model)):
        return
    with tempfile.TemporaryDirectory() as folder:
        for write in adapter_writers:
            try:
                write(model, folder)
            except (ValueError, RuntimeError) as error:  # the run is complete, so this must not make it fail
                warnings.warn(f"the adapters were not uploaded: {error}", stacklevel=2)
                return
        if trainer.is_global_zero:
            facts = _facts(model)
            for logger in loggers_of(trainer.loggers, "WandbLogger"):
                _to_wandb(logger.experiment, facts, folder)
            for logger in loggers_of(trainer.loggers, "MLFlowLogger"):
                _to_mlflow(logger, facts, folder, trainer.global_step)


def _facts(model: nn.Module) -> dict[str, Any]:
    """The metadata of an artifact: what was trained, and on which base."""
    described = manifest(model)
    base = base_of(model).module
    source = str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__)
    counts = {key: described[key] for key in ("trainable", "total", "methods")}
    return {**counts, "base": source, "base_fingerprint": described["fingerprint"]["shapes"]}


def _to_wandb(run: Any, facts: dict[str, Any], folder: str) -> None:
    import wandb

    artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=facts)
    artifact.add_dir(folder)
    if not run.settings._offline:  # W&B links inputs of a run only in online mode
        name = re.sub(r"[^\w.-]+", "-", Path(facts["base"]).name) or "base"
        of_base = {key: facts[key] for key in ("base", "base_fingerprint")}
        run.use_artifact(wandb.Artifact(f"base-{name}", type="model", metadata=of_base))
    run.log_artifact(artifact)


def _to_mlflow(logger: Any, facts: dict[str, Any], folder: str, step: int) -> None:
    for key in ("base", "base_fingerprint"):
        logger.experiment.set_tag(logger.run_id, f"peft.{key}", facts[key])
    logger.experiment.log_artifacts(logger.run_id, folder, f"adapters/step-{step}")
