"""What a run tells: the match table and the sizes on the console, configuration and counts in the loggers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from lightning_peft.core.inject import Injection
from lightning_peft.core.state import adapter_state
from lightning_peft.trainer.manifest import manifest

__all__ = ["log_end", "log_start"]


def log_start(trainer: L.Trainer, record: Injection) -> None:
    """Print the match table; give every logger the methods' configuration and the counts."""
    Console().print(record.report)
    methods = {name: {"method": type(m).__name__, **m.config()} for name, m in record.methods.items()}
    counts = {"trainable": record.report.trainable, "total": record.report.total, "percent": record.report.percent}
    for logger in trainer.loggers:
        logger.log_hyperparams({"peft": {"methods": methods, **counts}})


def log_end(trainer: L.Trainer, model: nn.Module) -> None:
    """Print the checkpoint's size beside the full model's; give W&B the adapter as an artifact of its own."""
    full = sum(t.numel() * t.element_size() for t in nn.Module.state_dict(model).values())
    trained = sum(t.numel() * t.element_size() for t in adapter_state(model).values())
    lines = [f"trainable state {_size(trained)}, full model {_size(full)}"]
    for callback in trainer.checkpoint_callbacks:
        path = Path(getattr(callback, "best_model_path", "") or "")
        if path.is_file():
            lines.append(f"checkpoint {path} {_size(path.stat().st_size)} (with optimizer state where it has one)")
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _log_adapter(logger, model)


def _log_adapter(logger: WandbLogger, model: nn.Module) -> None:
    import wandb

    artifact = wandb.Artifact(f"adapter-{logger.experiment.id}", type="adapter", metadata=_counts(model))
    with tempfile.TemporaryDirectory() as folder:
        save_trainable(model, Path(folder))
        artifact.add_dir(folder)
        logger.experiment.log_artifact(artifact)


def _counts(model: nn.Module) -> dict[str, Any]:
    described = manifest(model)
    return {"trainable": described["trainable"], "total": described["total"], "methods": described["methods"]}


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Write the trainable state as ``adapter_model.safetensors`` and its manifest as ``adapter_config.json``."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in adapter_state(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(manifest(model), indent=2, sort_keys=True))


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
