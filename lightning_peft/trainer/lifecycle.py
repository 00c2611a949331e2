"""What happens once per Trainer, however many methods are attached: checks, random streams, logging.

The first method's ``setup`` puts one :class:`Lifecycle` beside it into ``trainer.callbacks``.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.core.inject import injection_of
from lightning_peft.trainer import audit, logs
from lightning_peft.trainer.module import adapt_module
from lightning_peft.trainer.resume import gather, mine, rng_state, set_rng_state
from lightning_peft.trainer.strategy import adapt_strategy

__all__ = ["Lifecycle"]


class Lifecycle(Callback):
    """The Trainer's side of all attached methods."""

    def __init__(self) -> None:
        self._rng: Any = None
        self._gradients_checked = False
        self._calls: audit.CallAudit | None = None
        self._calls_checked = False

    @staticmethod
    def install(trainer: L.Trainer, module: L.LightningModule) -> None:
        """Prepare trainer and module for the methods among the trainer's callbacks; idempotent.

        Raises:
            MisconfigurationException: weight averaging is listed before a method, so that it would copy the
                model before the adapters are in.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        methods = [i for i, c in enumerate(callbacks) if hasattr(c, "plan") and hasattr(c, "may_change")]
        averaging = [i for i, c in enumerate(callbacks) if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if averaging and methods and averaging[0] < methods[-1]:
            names = type(callbacks[averaging[0]]).__name__, type(callbacks[methods[-1]]).__name__
            raise MisconfigurationException(
                f"{names[0]} is listed before {names[1]}, and would copy the model before its adapters are in: "
                "list it after the methods in Trainer(callbacks=[...])"
            )
        if not any(isinstance(c, Lifecycle) for c in callbacks):
            callbacks.insert(methods[0] + 1 if methods else len(callbacks), Lifecycle())
        adapt_module(module)
        adapt_strategy(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._gradients_checked = self._calls_checked = False
        audit.audit_ranks(pl_module, trainer.strategy)
        audit.audit_head(pl_module)
        audit.audit_optimizers(pl_module, trainer.optimizers)
        record = injection_of(pl_module)
        if record is not None and trainer.is_global_zero:
            logs.log_start(trainer, record)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if not self._gradients_checked and len(trainer.optimizers) == 1:
            self._gradients_checked = True
            audit.audit_gradients(pl_module, scaled=getattr(trainer.precision_plugin, "scaler", None) is not None)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if not self._calls_checked and self._calls is None and injection_of(pl_module) is not None:
            self._calls = audit.CallAudit(pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._calls is not None:
            calls, self._calls, self._calls_checked = self._calls, None, True
            calls.finish()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and injection_of(pl_module) is not None:
            logs.log_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": gather(rng_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng = mine(state_dict["rng"])
