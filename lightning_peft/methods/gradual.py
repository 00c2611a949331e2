"""Gradual unfreezing: the head trains first, then the blocks unfreeze one after another, from the output down.

    theta_l trains from time t_l on,    t_L <= t_{L-1} <= ... <= t_1

Lower layers start to train only after the layers above have adapted, which preserves more of what the base knows. All
unfrozen blocks continue to train; if every block is scheduled, the whole model trains at the end.

Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from attrs import field
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical, owner_of
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.freezing import unfreeze
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.frozen_parts import why_frozen
from lightning_peft.core.targeting.patterns import TargetError, as_patterns
from lightning_peft.methods.families.arguments import as_list, is_int, positive_int
from lightning_peft.methods.families.selection import (
    SelectionMethod,
    check_not_packed,
    depths,
    parameters_in,
    tail_modules,
)
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["GradualUnfreezing"]


class GradualUnfreezing(SelectionMethod):
    """Unfreezes the blocks one by one, from the output down (Howard & Ruder 2018, arXiv:1801.06146).

    Choose it when full fine-tuning forgets what the base knows, because data is scarce or unlike the base's training
    data. It costs as much as full fine-tuning once everything is unfrozen, and less before. Checkpoints grow as blocks
    unfreeze.

    The optimizer holds every scheduled parameter from the start (``configure_optimizers`` sees them as trainable), so
    your parameter groups and schedulers stay valid. A parameter that is still frozen has no gradient, so the optimizer
    skips it. Checkpoints record what is unfrozen, so a run resumes exactly. The original values of unfrozen parameters
    are kept on the CPU, so that an earlier checkpoint can still be loaded.

    Without a Trainer: ``lp.apply(model, method)``, build the optimizer over ``lp.trainable_parameters(model)``, and
    call ``method.advance(model, time)`` at the start of each epoch or step.

    Args:
        every: number of epochs (or steps) between two blocks, if ``schedule`` is None. All blocks unfreeze, and finally
            the layers before the first block (embeddings).
        schedule: time at which each block unfreezes, from the output down, counted from 0: ``[1, 2, 2]`` unfreezes the
            last block after one epoch, and the two blocks before it after two epochs. Blocks beyond the list stay
            frozen.
        unit: unit of these times: ``"epoch"``, or ``"step"`` (an optimizer step).
        targets: ``"blocks"`` (the repeated blocks found in the model), or patterns of modules to unfreeze instead, from
            the last one in the model to the first.
        exclude: patterns of modules that never train.
        trainable, name: see :class:`lightning_peft.PEFTMethod`. The layers after the last block train from the start.
        layer_decay: multiply the learning rate by this factor for each block further from the output; 1 / 2.6 in the
            paper.

    Raises:
        ValueError: if the schedule is empty, negative or not in ascending order.
        TargetError: if the schedule has more entries than there are blocks, or a pattern matches nothing.
        MisconfigurationException: if the strategy fixes the trainable parameters before the first step (DeepSpeed).

    Example::

        trainer = L.Trainer(callbacks=[lp.GradualUnfreezing(schedule=[1, 2, 3], layer_decay=0.4)])
    """

    parameter_count = "everything, in the end"
    resume_may_differ = SelectionMethod.resume_may_differ | {"every", "schedule", "unit"}

    every: int = field(default=1, validator=positive_int, kw_only=False)
    schedule: Sequence[int] | None = field(default=None, converter=as_list)
    unit: Literal["epoch", "step"] = "epoch"
    targets: str | Sequence[str] = field(default="blocks", kw_only=False)

    def check(self) -> None:
        if self.schedule is None:
            return
        if not self.schedule or not all(is_int(time) and time >= 0 for time in self.schedule):
            raise ValueError(f"schedule must be a list of {self.unit} numbers of at least 0, got {self.schedule!r}")
        if list(self.schedule) != sorted(self.schedule):
            raise ValueError(
                "schedule must be in ascending order, because blocks unfreeze from the output down; got "
                f"{self.schedule!r}"
            )

    def choose(self, model: nn.Module, plan: Plan) -> None:
        self.add_modules(model, tail_modules(model), plan)
        trains = {id(p) for name in plan.train_modules for p in model.get_submodule(name).parameters()}
        trains |= {id(model.get_parameter(name)) for name in plan.train}
        if not trains and self.times(model)[0] > 0:
            raise TargetError(
                f"GradualUnfreezing finds nothing to train before {self.unit} {self.times(model)[0]}: name the head in "
                f"trainable, or begin the schedule with 0{why_frozen(model)}"
            )
        excluded = self.covered(model, as_patterns(self.exclude, "exclude"), "exclude")
        for block in self.blocks(model):
            check_not_packed(model, block, excluded)
        for time, (stage, names) in zip(self.times(model), self.stages(model).items()):
            for name in names:
                check_not_packed(model, owner_of(name))
                if id(model.get_parameter(name)) not in trains:
                    plan.deferred[name] = stage, f"trains from {self.unit} {time}"

    def stages(self, model: nn.Module) -> dict[str, list[str]]:
        """The stages in order: each block's name, and the names of the parameters that unfreeze with it."""
        excluded = self.covered(model, as_patterns(self.exclude, "exclude"), "exclude")
        stages = {block: list(parameters_in(model, block)) for block in reversed(self.blocks(model))}
        if not self.patterns("blocks"):
            found = depths(model, self.trainable_modules(model))
            lowest = [name for name, depth in found.items() if depth == len(stages) + 1]
            stages |= {"before the first block": lowest} if lowest else {}
        # The record has the names at injection, which differ in parts that were compiled since.
        return {k: [canonical(n) for n in names if not excluded(owner_of(n))] for k, names in stages.items()}

    def times(self, model: nn.Module) -> list[int]:
        """The time at which each stage unfreezes.

        Raises:
            TargetError: if there are more times than stages.
        """
        stages = self.stages(model)
        if self.schedule is None:
            return [self.every * (i + 1) for i in range(len(stages))]
        if len(self.schedule) > len(stages):
            raise TargetError(
                f"schedule={self.schedule} goes past the last block: it has {len(self.schedule)} entries, and "
                f"{original_class(model).__name__} has {len(stages)} to unfreeze: {list(stages)}"
            )
        return list(self.schedule)

    def advance(self, model: nn.Module, time: int) -> list[str]:
        """Unfreeze everything due at ``time`` (completed epochs or optimizer steps).

        Returns:
            The names of the parameters that were frozen before.
        """
        record = injection_state(model)
        later = record.deferred if record is not None else {}
        due = [names for t, names in zip(self.times(model), self.stages(model).values()) if t <= time]
        return unfreeze(model, [name for names in due for name in names if name in later])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        kind = type(trainer.strategy).__name__
        if kind.startswith(("DeepSpeed", "Megatron")):
            raise MisconfigurationException(
                f"GradualUnfreezing is not supported with {kind}, which fixes the trainable parameters before the "
                "first step. Use DDPStrategy or ModelParallelStrategy, or train from the start with lp.LastLayers"
            )
        super().setup(trainer, pl_module, stage)
        self._due: list[int] | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._advance(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._advance(trainer, pl_module)  # also here, because runs that resume between two epochs skip the epoch start

    def _advance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        if self._due is None:
            self._due = self.times(pl_module)
        if not any(time <= now for time in self._due):
            return
        self._due = [time for time in self._due if time > now]
        new = self.advance(pl_module, now)
        if not new:
            return
        rank_zero_info(f"GradualUnfreezing: {len(new)} more parameters train from {self.unit} {now} on")
        strategy = trainer.strategy
        if isinstance(strategy, lightning_classes("strategies.DDPStrategy")) and strategy.model is not None:
            # DDP reduces only the gradients of parameters that were trainable when it was built, so rebuild it.
            module: Any = strategy.model.module
            strategy.model = None
            gc.collect()  # the old reducer's hooks go with it
            strategy.model = strategy._setup_model(module)
            strategy._register_ddp_hooks()
