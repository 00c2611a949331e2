"""The optimizer of the ready-made tasks: AdamW with linear warmup and decay."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


def adamw(module: L.LightningModule, lr: float, weight_decay: float, warmup: float) -> dict[str, Any]:
    """Return AdamW over the trainable parameters and its schedule, for ``configure_optimizers``.

    Weight decay does not apply to vectors (biases, norms, scales), as is usual for transformers.

    Args:
        module: The module, attached to a Trainer; the Trainer's number of steps determines the schedule.
        lr: The peak learning rate.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: The fraction of all steps during which the rate rises from 0 to ``lr``; it then falls linearly to 0.

    Raises:
        ValueError: if no parameter of ``module`` requires a gradient.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no parameter that requires grad, so there is nothing to train.")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
    total = module.trainer.estimated_stepping_batches

    def factor(step: int) -> float:
        rise = (step + 1) / max(1.0, warmup * total)
        fall = max(0.0, (total - step) / max(1.0, (1 - warmup) * total))
        return min(1.0, rise, fall)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
