"""The optimizer the ready tasks share: AdamW, a linear warmup, a linear decay."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


def adamw(module: L.LightningModule, lr: float, weight_decay: float, warmup: float) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: AdamW over the trainable parameters, its rate scheduled by step.

    Vectors (biases, norms, scales) are not decayed, as is usual for transformers.

    Args:
        module: The module, attached to a Trainer (whose number of steps sets the schedule).
        lr: The peak learning rate.
        weight_decay: Decoupled weight decay of the matrices.
        warmup: The fraction of all steps over which the rate rises from 0 to ``lr``; then it falls to 0.

    Raises:
        ValueError: No parameter of ``module`` requires a gradient.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no parameter that requires grad: nothing to train.")
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
