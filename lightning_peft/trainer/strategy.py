"""What the Trainer's strategy does differently while methods are attached: trimmed checkpoints, resumable data.

Trimming happens at the source, ``strategy.lightning_module_state_dict``: ``Callback.on_save_checkpoint`` is skipped
by weights-only saves, and DeepSpeed ignores what a hook leaves in the checkpoint.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_peft.trainer.module import trimmed
from lightning_peft.trainer.resume import make_resumable

__all__ = ["adapt_strategy"]


def adapt_strategy(trainer: L.Trainer) -> None:
    """Put the two changes on this strategy object; idempotent."""
    strategy = trainer.strategy
    if "_peft_adapted" in strategy.__dict__:
        return
    strategy.__dict__["_peft_adapted"] = True
    full_state, process = strategy.lightning_module_state_dict, strategy.process_dataloader

    def lightning_module_state_dict() -> dict[str, Any]:
        assert strategy.lightning_module is not None
        return trimmed(strategy.lightning_module, full_state())

    def process_dataloader(loader: object) -> object:
        loader = process(loader)
        return make_resumable(loader, trainer) if trainer.training else loader

    strategy.lightning_module_state_dict = lightning_module_state_dict  # type: ignore[method-assign]
    strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]
    if hasattr(strategy, "exclude_frozen_parameters"):
        strategy.exclude_frozen_parameters = True  # DeepSpeed writes its own files
