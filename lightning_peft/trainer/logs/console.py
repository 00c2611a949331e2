"""What a fit prints: the table of matches at its start, and the sizes of checkpoint and model at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from torch import Tensor, nn

from lightning_peft.core.record import InjectionState
from lightning_peft.core.state.state_dict import adapter_state
from lightning_peft.core.targeting.base_modules import local_state_dict
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["print_end", "print_start", "state_bytes"]


def print_start(trainer: L.Trainer, record: InjectionState) -> None:
    """Print the match table, unless ``Trainer(enable_model_summary=False)`` silences it."""
    if any(isinstance(c, lightning_classes("callbacks.ModelSummary")) for c in trainer.callbacks):  # type: ignore[attr-defined]
        Console().print(record.report)


def print_end(trainer: L.Trainer, model: nn.Module) -> None:
    """Print the sizes of the checkpoint and of the full model."""
    bar: Any = trainer.progress_bar_callback
    if bar is not None:
        bar.teardown(trainer, trainer.lightning_module, "fit")  # a running bar would be drawn over the lines
    trained, full = state_bytes(model)
    lines = [f"trainable state {_size(trained)}, full model {_size(full)}"]
    for callback in trainer.checkpoint_callbacks:
        path = Path(getattr(callback, "best_model_path", "") or "")
        if path.is_file():
            lines.append(f"checkpoint {path} {_size(path.stat().st_size)} (including optimizer state, if any)")
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)


def state_bytes(model: nn.Module) -> tuple[int, int]:
    """The sizes in bytes of the trained state, and of the state of the whole model."""
    return _bytes(adapter_state(model)), _bytes(local_state_dict(model))


def _bytes(state: Mapping[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor))


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
