"""Try out saving when a fit starts, so that errors appear before training instead of after it.

Nothing is written, no tensor is copied, and no value of the base is read.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.injection.saving_trial import saving_problem
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import holds_shards
from lightning_peft.trainer.audit import report
from lightning_peft.trainer.checkpoints.manifest import manifest
from lightning_peft.trainer.checkpoints.unsafe_hparams import unreadable

__all__ = ["try_saving"]


def try_saving(trainer: L.Trainer, module: Any) -> None:
    """Try the manifest, the module's own ``state_dict`` and ``on_save_checkpoint``, and saving each adapter.

    If the module's hooks raise because they need the state of a running fit, they are checked when the first checkpoint
    is saved. Sharded modules are not checked.

    Raises:
        StateError: if hooks remove part of the trainable state, or the manifest could not be read again.
        AuditError: if a trainable adapter could not be saved.
    """
    if holds_shards(module):  # collecting its state would gather tensors on all ranks
        return
    if trainer.checkpoint_callbacks:
        _try_manifest(module)
        _try_hooks(trainer, module)
    _try_formats(module)


def _try_manifest(module: nn.Module) -> None:
    facts = manifest(module)
    if (why := unreadable(facts)) is None:
        return
    for entry in facts["methods"]:
        for argument, value in entry["config"].items():
            if (reason := unreadable(value)) is not None:
                raise StateError(
                    f"{entry['method']} {entry['config'].get('name')!r}: its argument {argument} is a "
                    f"{type(value).__name__}, so no checkpoint of this run could be loaded: "
                    f"torch.load(weights_only=True) refuses it ({reason}). Make config() return plain values"
                )
    raise StateError(
        f"no checkpoint of this run could be loaded, because its manifest holds an object ({why}). Make config() of "
        "each method return plain values"
    )


def _try_hooks(trainer: L.Trainer, module: Any) -> None:
    # Only the user's own hooks can remove part of the state; without any, collecting it would be wasted time.
    if not any(_overridden(module, name) for name in ("state_dict", "on_save_checkpoint")):
        return
    checkpoint = {"epoch": 0, "global_step": 0, "hyper_parameters": dict(module.hparams), "optimizer_states": []}
    try:
        module.on_save_checkpoint({**checkpoint, "state_dict": trainer.strategy.lightning_module_state_dict()})
    except StateError:
        raise
    except Exception:  # the user's hook may need state that exists only during training
        pass


def _try_formats(module: nn.Module) -> None:
    record = injection_state(module)
    for name in [name for name, trains in record.trained_base.items() if trains] if record is not None else ():
        problem, notes = saving_problem(module, name)
        if problem is not None:
            report(module, f"{problem}. Fix this before training")
        for note in notes:
            rank_zero_info(note)


def _overridden(module: nn.Module, name: str) -> bool:
    owner = next(cls for cls in original_class(module).__mro__ if name in vars(cls))
    return owner.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning")
