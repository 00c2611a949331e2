"""Finish the epoch of a checkpoint that was saved after the epoch's last batch, but before the epoch's end."""

from __future__ import annotations

from typing import Any

__all__ = ["finish_epoch", "saved_before_epoch_end"]


def finish_epoch(trainer: Any) -> None:
    """Run what the saved run did after the checkpoint: validation, plateau schedulers and the hooks of the epoch's end.

    Lightning 2.6 skips all of this on such a resume. It counts the epoch as finished, then trains the next one without
    counting that it started, so that a checkpoint of the next epoch resumes at its first batch again and trains it
    twice. This runs in ``on_train_start`` of the strategy, which comes after those of all callbacks and the module.
    """
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    # Lightning clears this flag only after the resumed epoch, and steps no plateau scheduler while it is set.
    fit._restarting = False
    if not _before_epoch_end(fit):
        return
    for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
        progress.processed -= 1  # fit.reset() has counted the epoch as finished
        progress.completed -= 1
    # The checkpoint was saved in a hook of the batch's end, before Lightning counted the batch as completed.
    epoch.batch_progress.increment_completed()
    # The validation and the hooks below were not begun in the saved run, so no loop may treat them as resumed.
    for loop in (epoch, epoch.val_loop):
        loop._restarting = False
        loop.reset_restart_stage()
    epoch.on_advance_end(fit._data_fetcher)  # runs the validation
    epoch.on_iteration_done()
    fit.on_advance_end()  # runs the hooks of the epoch's end
    fit.on_iteration_done()


def saved_before_epoch_end(trainer: Any) -> bool:
    """Whether the loaded checkpoint needs :func:`finish_epoch`; may be called before the run starts."""
    fit = trainer.fit_loop
    if hasattr(fit, "update_restart_stage"):
        fit.update_restart_stage()
    return _before_epoch_end(fit)


def _before_epoch_end(fit: Any) -> bool:
    epoch = fit.epoch_loop  # releases before 2.5.3 do not have the two stages
    stage = getattr(epoch, "restarted_on_train_batch_end", False) and getattr(fit, "restarted_mid_epoch", False)
    return stage and epoch.batch_progress.is_last_batch
