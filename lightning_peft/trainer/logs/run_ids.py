"""Continue the runs of W&B and MLflow when a fit is resumed: their ids are stored in checkpoints."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.trainer.checkpoints.manifest import KEY
from lightning_peft.trainer.logs.loggers import loggers_of

__all__ = ["continue_runs", "resume_runs", "run_ids"]


def run_ids(trainer: Any) -> dict[str, list[str | None]]:
    """The ids of the current runs of W&B and MLflow, in the order of the loggers, to be stored in a checkpoint."""
    loggers = getattr(trainer, "loggers", ())
    return {
        "wandb": [logger.version for logger in loggers_of(loggers, "WandbLogger")],
        "mlflow": [logger._run_id for logger in loggers_of(loggers, "MLFlowLogger")],
    }


def resume_runs(loggers: Iterable[Any], ckpt_path: str | Path | None) -> None:
    """Make the loggers of W&B and MLflow continue the runs whose ids a checkpoint stores.

    Call this before ``trainer.fit(ckpt_path=...)``, because ``fit`` starts the loggers' runs before it calls any
    callback. Otherwise W&B continues the old run a moment later, and in online mode an empty run is left behind; MLflow
    keeps the new run. A logger that has an id already, or whose run has started, keeps it.

    Args:
        loggers: Any loggers, as in ``trainer.loggers``.
        ckpt_path: A checkpoint file or folder. None and paths that do not exist (``"last"``) have no effect.

    Raises:
        StateError: if the checkpoint stores an id that cannot be one of W&B's or MLflow's.
    """
    path = Path(ckpt_path or "")
    if path.is_dir():
        path = path / "meta.pt"
    if not path.is_file():
        return
    loggers = list(loggers)
    checkpoint = read_torch_file(path, mmap=path.suffix != ".pt")
    saved = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    saved = saved if isinstance(saved, dict) else {}
    for logger, run_id in zip(loggers_of(loggers, "WandbLogger"), saved.get("wandb", [])):
        if run_id is not None and logger._experiment is None and logger._wandb_init.get("id") is None:
            _set_wandb_id(logger, run_id)
    for logger, run_id in zip(loggers_of(loggers, "MLFlowLogger"), saved.get("mlflow", [])):
        if run_id is not None and logger._run_id is None:
            _set_mlflow_id(logger, run_id)


def continue_runs(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Switch the W&B loggers of a resumed fit to the runs whose ids the manifest of the checkpoint stores.

    The Trainer starts a new run before it calls any callback. If that run is still empty, it is finished and replaced.
    MLflow's run is kept, with a warning.
    """
    if trainer is None or trainer.state.fn != "fit":
        return
    for logger, run_id in zip(loggers_of(trainer.loggers, "WandbLogger"), saved.get("wandb", [])):
        run = logger._experiment
        if run_id is None or run is None or run.id == run_id or logger._wandb_init.get("id") is not None:
            continue
        if run.step:
            _warn_kept("W&B", run.id, run_id)
            continue
        folder = Path(run.dir).parent if run.settings._offline else None
        run.finish()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        logger._experiment = None
        _set_wandb_id(logger, run_id)
        _ = logger.experiment  # starts the run, now under the old id
    for logger, run_id in zip(loggers_of(trainer.loggers, "MLFlowLogger"), saved.get("mlflow", [])):
        if run_id is not None and trainer.is_global_zero and logger._run_id not in (None, run_id):
            _warn_kept("MLflow", logger._run_id, run_id)  # not replaced: it may be the one that the user gave


def _warn_kept(kind: str, new: str, old: str) -> None:
    warnings.warn(
        f"{kind} run {new} is used, although the checkpoint belongs to run {old}. To continue that run, call "
        "resume_runs(loggers, ckpt_path) before fit",
        stacklevel=3,
    )


def _check_id(run_id: Any, kind: str) -> None:
    # The id becomes part of a path, so an id from a file must not be able to lead out of the folder of runs.
    if not isinstance(run_id, str) or not re.fullmatch(r"[\w-]{1,128}", run_id):
        raise StateError(
            f"the checkpoint stores {run_id!a} as the id of a {kind} run, which is not a valid id: it was edited"
        )


def _set_wandb_id(logger: Any, run_id: str) -> None:
    _check_id(run_id, "W&B")
    logger._wandb_init.update(id=run_id, resume="allow")
    logger._id = run_id


def _set_mlflow_id(logger: Any, run_id: str) -> None:
    """Make ``logger`` continue a run, or warn if its server does not have it."""
    _check_id(run_id, "MLflow")
    try:
        logger._mlflow_client.update_run(run_id, status="RUNNING")
    except Exception as error:  # mlflow raises other classes for each kind of store
        warnings.warn(f"MLflow run {run_id} of the checkpoint cannot be continued: {error}", stacklevel=3)
        return
    logger._run_id = run_id
