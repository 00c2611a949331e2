"""What a command prints: only this package's own output, and at the end of a fit its results and the next command."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table

__all__ = ["NoSummary", "print_results", "silence_other_packages"]

#: messages of Lightning about its own machinery, in which nothing is wrong
_MACHINERY = re.compile(
    r"💡 Tip|[GHT]PU available:|Adding \d+ callbacks from entry point|Seed set to|`Trainer.fit` stopped: `max_"
    r"|`Trainer\(limit_|Trainer already configured with model summary|Running in `fast_dev_run`"
    r"|Restoring states|Loaded model weights|Restored all states|Loading `train_dataloader` to estimate"
)
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "")

#: warnings about the code of other packages, which a user cannot change
_WARNINGS = (
    ".*LeafSpec.*is deprecated",
    ".*does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",
)


class NoSummary(ModelSummary):
    """Takes the place of Lightning's summary of the model, because the table of methods counts the parameters."""

    def __init__(self) -> None:
        super().__init__(max_depth=0)


def silence_other_packages() -> None:
    """Hide tips, load reports and warnings of other packages that a user cannot act on."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_not_machinery)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for package in ("lightning", "pytorch_lightning", "torch", "transformers", "torchmetrics"):
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=kind, module=rf"{package}\.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules and os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _is_not_machinery(record: logging.LogRecord) -> bool:
    return not _MACHINERY.match(record.getMessage())


def print_results(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Print the metrics at the end of a fit, and the command that uses its checkpoint."""
    folder = trainer.log_dir or trainer.default_root_dir  # on every rank, because log_dir is broadcast
    if not trainer.is_global_zero:
        return
    table = Table("metric", "last", "best")
    best = {
        monitor: f"{score:.4g}"
        for callback in trainer.checkpoint_callbacks
        if (monitor := getattr(callback, "monitor", None)) and (score := getattr(callback, "best_model_score", None))
    }
    last = {name: f"{float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items())}
    for name, value in last.items():
        if not name.endswith(("_step", "_epoch")) or name.rpartition("_")[0] not in last:
            table.add_row(name, value, best.get(name, ""))
    console = Console()
    if table.rows:
        console.print(table)
    checkpoint = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or "")
    config = Path(folder) / "config.yaml"
    if checkpoint.is_file() and config.is_file():
        command = "predict" if is_overridden("predict_step", module) else "test"
        files = [os.path.relpath(path) for path in (config, checkpoint)]
        print(f"Next: lightning-peft {command} \\\n  --config {files[0]} \\\n  --ckpt_path {files[1]}")
