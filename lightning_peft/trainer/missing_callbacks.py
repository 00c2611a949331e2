"""Check that every method that acts during training is among the Trainer's callbacks.

A module that applies methods itself (``lp.apply(self, lp.DyLoRA())``) has the adapters, but the Trainer does not know
the method: DyLoRA would draw no rank, AdaLoRA would prune nothing, GradualUnfreezing would unfreeze nothing.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.core.record import injection_state
from lightning_peft.trainer.audit import report

__all__ = ["audit_callbacks"]

_HOOKS = [name for name in vars(Callback) if name.startswith(("on_train_", "on_before_", "on_after_"))]


def audit_callbacks(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Report methods that train and have training hooks which this Trainer will not call.

    A loaded adapter may train on without its method's hooks, at the ranks that it was saved with; this is a warning.

    Raises:
        AuditError: if such a method has ``audit="error"``.
    """
    record = injection_state(module)
    if record is None:
        return
    for name, method in record.methods.items():
        kind = type(method)
        hooks = [h for h in _HOOKS if getattr(kind, h, None) is not getattr(Callback, h)]
        if not hooks or not record.trained_base.get(name) or any(c is method for c in trainer.callbacks):  # type: ignore[attr-defined]
            continue
        if record.origins.get(name):
            rank_zero_warn(
                f"the loaded {kind.__name__} adapter {name!r} trains as it was saved, without its method's "
                f"{', '.join(hooks)}. To train it as {kind.__name__} does, pass the method to the Trainer instead"
            )
        else:
            report(
                module,
                f"{kind.__name__} {name!r} was applied by the module, and this Trainer does not call its "
                f"{', '.join(hooks)}: pass the method to Trainer(callbacks=[...]) instead, or as well",
            )
