"""Change the Trainer's strategy while methods are attached: checkpoints, data and optimizers without gradients.

Checkpoints are trimmed where the strategy collects the state, in ``strategy.lightning_module_state_dict``. A callback
could not do it: weights-only saves skip ``Callback.on_save_checkpoint``, and DeepSpeed ignores what a hook changes in
the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical
from lightning_peft.core.state.state_dict import StateError, owned_keys, trainable_keys
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.trainer import fsdp1
from lightning_peft.trainer.checkpoints import sharded
from lightning_peft.trainer.checkpoints.manifest import check_seal
from lightning_peft.trainer.checkpoints.one_step_save import save_in_one_step
from lightning_peft.trainer.checkpoints.optimizer_names import in_order
from lightning_peft.trainer.checkpoints.sharded_folder import recover_path
from lightning_peft.trainer.checkpoints.trimming import trim_state
from lightning_peft.trainer.optimizers import has_gradients
from lightning_peft.trainer.packages import lightning_classes
from lightning_peft.trainer.resume.dataloaders import TrainingLoaders
from lightning_peft.trainer.resume.epoch_end import finish_epoch

__all__ = ["adapt_strategy", "partitions_optimizers"]


def partitions_optimizers(strategy: object) -> bool:
    """Whether the strategy (DeepSpeed) replaces the parameters in optimizers by flat parts, and takes the gradients."""
    return hasattr(strategy, "exclude_frozen_parameters")


def adapt_strategy(trainer: L.Trainer, loaders: TrainingLoaders) -> None:
    """Replace functions of the Trainer's strategy object; idempotent.

    Args:
        trainer: The Trainer whose strategy is changed.
        loaders: Wraps the training loaders during a fit, to make them resumable.

    Raises:
        MisconfigurationException: with DeepSpeed stage 3, or FSDP1 with ``use_orig_params=False``.
    """
    strategy: Any = trainer.strategy
    if "_peft_adapted" in strategy.__dict__:
        return
    if getattr(strategy, "zero_stage_3", False):
        raise MisconfigurationException(
            "DeepSpeed stage 3 is not supported with PEFT methods yet: it partitions parameters as they are created, "
            "so adapters would get empty ones. Use stage 2, or FSDP2 with ModelParallelStrategy"
        )
    strategy.__dict__["_peft_adapted"] = True
    spawning = lightning_classes("strategies.launchers.multiprocessing._MultiProcessingLauncher")
    if isinstance(strategy.launcher, spawning) and trainer.state.fn == "fit":
        rank_zero_warn(
            f"{type(strategy).__name__} trains copies of the module in other processes, and Lightning does not copy "
            "adapters back: after fit, the module in this process has the trained heads but no adapters. Load the "
            "result with lp.load_from_checkpoint, or train with strategy='ddp'"
        )
    full_state, process = strategy.lightning_module_state_dict, strategy.process_dataloader
    step, start, end = strategy.optimizer_step, strategy.on_train_start, strategy.teardown
    load, load_optimizers = strategy.load_checkpoint, strategy.load_optimizer_state_dict

    def lightning_module_state_dict() -> dict[str, Any]:
        module = strategy.lightning_module
        return trim_state(module, full_state(), trainable_keys(module))

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # With None, torch before 2.6, and Lightning for remote files, would unpickle any object.
        weights_only = True if weights_only is None else weights_only
        # Strategies that load the state themselves, and a user's own CheckpointIO, are not bypassed.
        plain = type(strategy).load_checkpoint.__qualname__ == "Strategy.load_checkpoint"
        plain = plain and original_class(strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
        if plain and not Path(checkpoint_path).is_file():
            recover_path(strategy, Path(checkpoint_path))  # the process may have been killed while saving
        if plain and Path(checkpoint_path).is_dir():
            from lightning_peft.trainer.checkpoints.folder_reader import read_folder

            checkpoint = read_folder(Path(checkpoint_path), weights_only)
        elif plain and weights_only and Path(checkpoint_path).is_file():
            checkpoint = read_torch_file(checkpoint_path)
        else:
            checkpoint = load(checkpoint_path, weights_only=weights_only)
        check_seal(checkpoint, checkpoint_path)
        return checkpoint

    def load_optimizer_state_dict(checkpoint: Mapping[str, Any]) -> None:
        module, states = strategy.lightning_module, checkpoint["optimizer_states"]
        try:
            ordered = [in_order(saved, one, module) for saved, one in zip(states, strategy.optimizers)]
            load_optimizers({**checkpoint, "optimizer_states": ordered})
        except ValueError as error:
            now = owned_keys(strategy.lightning_module)
            frozen = sorted({canonical(k) for k in checkpoint["state_dict"]} - now)
            why = f"it trained {', '.join(frozen[:4])}, which this run freezes" if frozen else str(error)
            raise StateError(
                f"the checkpoint's optimizer state does not fit this run: {why}. Train the same parameters, or load "
                "only the weights, with lp.load_from_checkpoint, and start a new run"
            ) from error

    def optimizer_step(optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        if scaler is None or strategy.lightning_module.automatic_optimization:
            return step(optimizer, closure, *args, **kwargs)
        # With manual optimization, an optimizer may be stepped that has no gradients, because all its parameters are
        # frozen or another optimizer is toggled. In float32 such a step has no effect, but GradScaler would raise.
        result = closure()
        if has_gradients(optimizer):
            return step(optimizer, lambda: result, *args, **kwargs)
        return optimizer.step(**kwargs)

    def process_dataloader(loader: object) -> object:
        loader = process(loader)
        # Only training resumes inside an epoch; a validation always starts at its first batch.
        return loaders.wrap(loader, trainer) if trainer.training else loader

    def on_train_start() -> None:
        start()
        finish_epoch(trainer)

    def teardown() -> None:
        # At the end of every run. After an exception, this is later than the callbacks that then save a checkpoint.
        loaders.release(trainer)
        end()

    # Set on the instance, because the strategy exists already, and its class may be the user's.
    strategy.lightning_module_state_dict = lightning_module_state_dict
    strategy.load_checkpoint = load_checkpoint
    strategy.load_optimizer_state_dict = load_optimizer_state_dict
    strategy.optimizer_step = optimizer_step
    strategy.process_dataloader = process_dataloader
    strategy.on_train_start = on_train_start
    strategy.teardown = teardown
    save_in_one_step(strategy)
    if isinstance(strategy, lightning_classes("strategies.ModelParallelStrategy")):
        sharded.adapt(strategy)
    if isinstance(strategy, lightning_classes("strategies.FSDPStrategy")):
        fsdp1.adapt(strategy)
    if partitions_optimizers(strategy):
        strategy.exclude_frozen_parameters = True  # DeepSpeed writes its own files, which are trimmed by this option
