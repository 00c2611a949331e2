"""Console and logger output of a run: match table, sizes, configurations, parameter counts, W&B artifacts and ids."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from torch import Tensor, nn

from lightning_peft.core.record import InjectionState
from lightning_peft.core.state.state_dict import StateError, adapter_state
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.core.targeting.base_model import base_of
from lightning_peft.core.targeting.base_modules import holds_shards
from lightning_peft.trainer.checkpoints.manifest import KEY, manifest
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["adapter_writers", "continue_runs", "log_adapters", "log_end", "log_start", "resume_wandb", "run_ids"]

#: functions that write all adapters of a model to a folder; the formats register theirs here
adapter_writers: list[Callable[[nn.Module, str], object]] = []


def log_start(trainer: L.Trainer, record: InjectionState) -> None:
    """Print the match table, and log the methods' configurations and the parameter counts to every logger.

    ``Trainer(enable_model_summary=False)`` silences the table too.
    """
    if any(isinstance(c, lightning_classes("callbacks.ModelSummary")) for c in trainer.callbacks):  # type: ignore[attr-defined]
        Console().print(record.report)
    methods = {name: {"method": type(m).__name__, **m.config()} for name, m in record.methods.items()}
    counts = {"trainable": record.report.trainable, "total": record.report.total, "percent": record.report.percent}
    for logger in trainer.loggers:
        logger.log_hyperparams({"peft": {"methods": methods, **counts}})


def log_end(trainer: L.Trainer, model: nn.Module) -> None:
    """Print the sizes of the checkpoint and of the full model."""
    bar: Any = trainer.progress_bar_callback
    if bar is not None:
        bar.teardown(trainer, trainer.lightning_module, "fit")  # a running bar would be drawn over what is printed
    full, trained = (_bytes(state) for state in (nn.Module.state_dict(model), adapter_state(model)))
    lines = [f"trainable state {_size(trained)}, full model {_size(full)}"]
    for callback in trainer.checkpoint_callbacks:
        path = Path(getattr(callback, "best_model_path", "") or "")
        if path.is_file():
            lines.append(f"checkpoint {path} {_size(path.stat().st_size)} (including optimizer state, if any)")
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)


def run_ids(trainer: Any) -> list[str | None]:
    """The ids of the current W&B runs, in the order of the loggers, to be stored in a checkpoint."""
    return [logger.version for logger in _wandb_loggers(getattr(trainer, "loggers", ()))]


def resume_wandb(loggers: Iterable[Any], ckpt_path: str | Path | None) -> None:
    """Make W&B loggers continue the runs whose ids a checkpoint stores.

    Call this before ``trainer.fit(ckpt_path=...)``, which starts the loggers' runs first. Otherwise the old run is
    continued a moment later, and in online mode an empty run is left behind. A logger that has an id already, or whose
    run has started, keeps it.

    Args:
        loggers: Any loggers, as in ``trainer.loggers``.
        ckpt_path: A checkpoint file or folder. None and paths that do not exist (``"last"``) have no effect.

    Raises:
        StateError: if the checkpoint stores an id that cannot be one of W&B's.
    """
    path = Path(ckpt_path or "")
    if path.is_dir():
        path = path / "meta.pt"
    if not path.is_file():
        return
    checkpoint = read_torch_file(path, mmap=path.suffix != ".pt")
    said = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    ids = said.get("wandb", []) if isinstance(said, dict) else []
    for logger, run_id in zip(_wandb_loggers(loggers), ids):
        if run_id is not None and logger._experiment is None and logger._wandb_init.get("id") is None:
            _set_run_id(logger, run_id)


def continue_runs(trainer: Any, ids: Iterable[str | None]) -> None:
    """Switch the loggers of a resumed fit to the runs whose ids the checkpoint stores.

    The Trainer starts a new run before it calls any callback. If that run is still empty, it is finished and replaced.
    """
    if trainer is None or trainer.state.fn != "fit":
        return
    for logger, run_id in zip(_wandb_loggers(trainer.loggers), ids):
        run = logger._experiment
        if run_id is None or run is None or run.id == run_id or logger._wandb_init.get("id") is not None:
            continue
        if run.step:
            warnings.warn(
                f"W&B run {run.id} already has data, so it is kept, although the checkpoint belongs to run {run_id}. "
                "To continue that run, call resume_wandb(loggers, ckpt_path) before fit",
                stacklevel=2,
            )
            continue
        folder = Path(run.dir).parent if run.settings._offline else None
        run.finish()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        logger._experiment = None
        _set_run_id(logger, run_id)
        _ = logger.experiment  # starts the run, now under the old id


def _wandb_loggers(loggers: Iterable[Any]) -> list[Any]:
    return [logger for logger in loggers if isinstance(logger, lightning_classes("loggers.WandbLogger"))]


def _set_run_id(logger: Any, run_id: str) -> None:
    # W&B uses the id in a path, so an id from a file must not be able to lead out of the folder of runs.
    if not isinstance(run_id, str) or not re.fullmatch(r"[\w-]{1,128}", run_id):
        raise StateError(
            f"the checkpoint stores {run_id!a} as the id of a W&B run, which is not a valid id: it was edited"
        )
    logger._wandb_init.update(id=run_id, resume="allow")
    logger._id = run_id


def log_adapters(trainer: L.Trainer, model: nn.Module) -> None:
    """Log the adapters to W&B as an artifact: a directory that ``lp.load_adapter`` reads.

    Each version of the artifact names the base in its metadata. In online mode, the base is also logged as an input of
    the run. All ranks must call this, because writing a sharded model gathers its tensors.
    """
    loggers = _wandb_loggers(trainer.loggers)
    if not loggers or not (trainer.is_global_zero or holds_shards(model)):
        return
    with tempfile.TemporaryDirectory() as folder:
        for write in adapter_writers:
            try:
                write(model, folder)
            except (ValueError, RuntimeError) as error:  # the run is complete, so this must not make it fail
                warnings.warn(f"the adapters were not logged to W&B: {error}", stacklevel=2)
                return
        if trainer.is_global_zero:
            for logger in loggers:
                _log_artifact(logger.experiment, model, folder)


def _log_artifact(run: Any, model: nn.Module, folder: str) -> None:
    import wandb

    described = manifest(model)
    base = base_of(model).module
    source = str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__)
    facts = {"base": source, "base_fingerprint": described["fingerprint"]["shapes"]}
    artifact = wandb.Artifact(
        f"adapter-{run.id}",
        type="adapter",
        metadata={**{key: described[key] for key in ("trainable", "total", "methods")}, **facts},
    )
    artifact.add_dir(folder)
    if not run.settings._offline:  # W&B links inputs of a run only in online mode
        name = re.sub(r"[^\w.-]+", "-", Path(source).name) or "base"
        run.use_artifact(wandb.Artifact(f"base-{name}", type="model", metadata=facts))
    run.log_artifact(artifact)


def _bytes(state: Mapping[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor))


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
