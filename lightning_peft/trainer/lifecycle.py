"""The callback for everything that all attached methods share: checks, RNG states, the console.

The ``setup`` of the first method adds one :class:`Lifecycle` to ``trainer.callbacks``.

The order of Lightning's hooks in a fit, and what this package does in each::

    setup                      methods wrap configure_model; the strategy is made to save trimmed checkpoints
    configure_model            the user's modules exist; adapters are injected, before sharding and the optimizer
    on_load_checkpoint         on resume: read the gradients of an unfinished accumulation
    load_state_dict            on resume: read the RNG states
    configure_optimizers       the user builds the optimizer; methods change its parameter groups
    on_fit_start               check record, head, optimizers and saving; log the configuration
    on_train_start             compare ranks; restore loaders, RNG states and gradients
    on_train_batch_start       set adapters and heads to training mode; watch the first batch
    on_before_backward         check the loss
    on_before_optimizer_step   check which adapters ran and which parameters got finite gradients
    on_train_batch_end         compare ranks once, after the first step
    on_save_checkpoint         add RNG states and gradients to the trimmed state
    on_train_end, on_fit_end   restore the modes; print the sizes
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.names import canonical
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.consistency import check_record, update_base
from lightning_peft.core.state.state_dict import fix_trained
from lightning_peft.trainer import audit
from lightning_peft.trainer.audit_calls import CallAudit
from lightning_peft.trainer.audit_ranks import audit_ranks
from lightning_peft.trainer.averaging import adapt_averaging
from lightning_peft.trainer.logs.console import print_end, print_start
from lightning_peft.trainer.logs.loggers import log_config
from lightning_peft.trainer.missing_callbacks import audit_callbacks
from lightning_peft.trainer.modes import TrainingMode
from lightning_peft.trainer.refused_callbacks import refuse_callbacks
from lightning_peft.trainer.resume.dataloaders import TrainingLoaders
from lightning_peft.trainer.resume.rng_state import gather_ranks, rng_state, this_rank
from lightning_peft.trainer.saving_trial import try_saving
from lightning_peft.trainer.strategy import adapt_strategy, partitions_optimizers
from lightning_peft.trainer.zero_gradients import ZeroGradientAudit

__all__ = ["Lifecycle", "is_compiled"]

GRADIENTS = "lightning_peft_gradients"


class Lifecycle(Callback):
    """Runs the checks, the exact resume and the output that all attached methods share."""

    def __init__(self) -> None:
        self._loaders = TrainingLoaders()
        self._gradients: dict[str, torch.Tensor] = {}
        self._gradient_audit: audit.GradientAudit | None = None
        self._zero_gradients: ZeroGradientAudit | None = None
        self._unfrozen: audit.UnfrozenAudit | None = None
        self._calls: CallAudit | None = None
        self._called: set[str] | None = None
        self._modes: TrainingMode | None = None
        self._watched: set[str] = set()  # stages whose first batch was watched by a CallAudit
        self._ranks_checked = False
        self._went_backward = False  # whether backward ran since the last optimizer step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        adapt_averaging(trainer.callbacks)  # type: ignore[attr-defined]
        adapt_strategy(trainer, self._loaders)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watched, self._called, self._ranks_checked = set(), None, False
        check_record(pl_module)
        update_base(pl_module)
        fix_trained(pl_module)
        audit_callbacks(trainer, pl_module)
        audit.audit_active(pl_module)
        audit.audit_head(pl_module)
        audit.audit_hyperparameters(pl_module.hparams)
        try_saving(trainer, pl_module)
        self._unfrozen = audit.UnfrozenAudit(pl_module)
        if not partitions_optimizers(trainer.strategy):
            audit.audit_optimizers(pl_module, trainer.optimizers)
            # With several optimizers, one step legitimately leaves the others' parameters without a gradient.
            self._gradient_audit = audit.GradientAudit(pl_module) if len(trainer.optimizers) == 1 else None
            self._zero_gradients = ZeroGradientAudit(pl_module)
        self._modes = TrainingMode(pl_module)
        record = injection_state(pl_module)
        if record is not None and trainer.is_global_zero:
            print_start(trainer, record)
            log_config(trainer, pl_module, record)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        audit_ranks(pl_module)
        self._loaders.saved.restore(trainer)
        # Not in on_load_checkpoint: the module may not be on its device yet.
        for name, parameter in pl_module.named_parameters():
            if canonical(name) in self._gradients:
                parameter.grad = self._gradients[canonical(name)].to(parameter.device)
        self._gradients = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._modes is not None:
            self._modes.enter()  # in every batch, because the user's hooks may set an adapted module to eval mode
        self._watch("training", pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._calls is not None:  # the batch ended without an optimizer step
            self._stop_watching("training")
        if not self._ranks_checked and trainer.global_step > 0:
            self._ranks_checked = True
            audit_ranks(pl_module)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if self._calls is not None:
            self._calls.end_forward()
        audit.audit_loss(pl_module, loss, trainer.optimizers)
        self._went_backward = True

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._calls is not None:
            self._stop_watching("training")
        if self._unfrozen is not None:
            self._unfrozen.look(trainer.optimizers)
        if pl_module.automatic_optimization and not self._went_backward:
            return  # training_step returned None to skip the batch, so it is right that nothing has a gradient
        self._went_backward = False
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._gradient_audit is not None:
            self._gradient_audit.step(self._called, scaler is not None)
            if not self._gradient_audit.waiting:
                self._gradient_audit = None
        audit.audit_scaler(scaler, optimizer)
        if self._zero_gradients is not None:
            self._zero_gradients.step(optimizer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave_modes()
        self._abandon_watch()  # if the fit ended with a batch that a hook skipped
        if self._gradient_audit is not None:
            self._gradient_audit.finish()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._watch("evaluation", pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._stop_watching("evaluation")

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _watch(self, stage: str, module: nn.Module) -> None:
        if stage in self._watched or self._calls is not None:
            return
        if is_compiled(module):
            self._watched.add(stage)  # later batches need not check again
        else:
            # Under a function mode, torch leaves fast paths (nn.MultiheadAttention in eval mode), so gradients may be
            # rounded differently. A resumed run would differ from the uninterrupted one, which is not watched there.
            resumed = stage == "training" and getattr(module.trainer, "ckpt_path", None) is not None
            self._calls = CallAudit(module, operations=not resumed)

    def _stop_watching(self, stage: str) -> None:
        calls, self._calls = self._calls, None
        if calls is not None:
            self._watched.add(stage)
            self._called = calls.report(stage)

    def _abandon_watch(self) -> None:
        if self._calls is not None:
            self._calls.finish()
            self._calls = None

    def _leave_modes(self) -> None:
        if self._modes is not None:
            self._modes.leave()
            self._modes = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave_modes()
        self._abandon_watch()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and injection_state(pl_module) is not None:
            print_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": gather_ranks(rng_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaders.saved.load(state_dict["rng"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaders.save_released(checkpoint)
        # In the middle of gradient accumulation, the gradients so far are part of the state.
        if trainer.accumulate_grad_batches > 1 and trainer.fit_loop._should_accumulate():
            grads = {canonical(n): p.grad.cpu() for n, p in pl_module.named_parameters() if p.grad is not None}
            checkpoint[GRADIENTS] = gather_ranks(grads)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._gradients = (this_rank(checkpoint[GRADIENTS]) if GRADIENTS in checkpoint else None) or {}


def is_compiled(model: nn.Module) -> bool:
    """Whether a module is compiled. Watching a batch swaps classes, which would trigger a recompilation."""
    optimized = torch._dynamo.eval_frame.OptimizedModule
    if getattr(model, "_compiler_ctx", None) is not None:  # Lightning runs a compiled LightningModule without wrapper
        return True
    return any(isinstance(m, optimized) or m._compiled_call_impl is not None for m in model.modules())
