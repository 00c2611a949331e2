"""``TrainTogether``: train the adapters of several methods side by side, with one pass of the base for all."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import add_mixin, remove_mixin
from lightning_peft.core.injection.overrides import override_trained
from lightning_peft.core.names import is_within, join, listed
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.switching.active import set_active
from lightning_peft.core.switching.rows import rows
from lightning_peft.core.targeting.base_modules import base_modules, base_parameters
from lightning_peft.trainer.frozen_cache.callback import CacheFrozen
from lightning_peft.trainer.lifecycle import is_compiled
from lightning_peft.trainer.logs.artifacts import adapter_writers
from lightning_peft.trainer.packages import lightning_classes
from lightning_peft.trainer.prepare_run import prepare_run
from lightning_peft.trainer.retention import Retention
from lightning_peft.trainer.together.meeting import CannotTrainTogether, Meeting, MeetingPoint
from lightning_peft.trainer.together.module import OPTIONAL, SideBySide, TogetherModule, call_hook, make_view

__all__ = ["TrainTogether"]


class TrainTogether(L.Callback):
    """Train the adapter of each attached method by itself, with one pass of the base for all of them.

    Without this callback, the adapters of several methods run one after another in the same forward. With it, each is
    trained as if its method were the only one: it has its own optimizer, schedule, loss and metrics, and its own copies
    of the parameters that ``trainable`` selects. In each step, ``training_step`` runs once for each adapter, up to its
    call of the network; the batches are joined, and the network runs once, as in :func:`lightning_peft.rows`. Each
    adapter ends with the values that it would have alone, up to rounding that depends on the size of a batch.

    Metrics are logged under the adapter's name: ``a/val_loss``. Validation, test and prediction run once for each
    adapter. If a batch is a dictionary whose keys are the adapters' names, each adapter gets its own part. After the
    fit, no adapter is active; see :func:`lightning_peft.set_active`.

    Args:
        hparams: for each adapter name, a dictionary of the hyperparameters in which this adapter differs. Its keys are
            the names that ``configure_optimizers`` and the steps read (``"lr"`` for ``self.hparams.lr`` or
            ``self.lr``). Values that the shared network reads itself are the same for all adapters.
        early_stopping: stops each adapter separately: one callback, which is copied for each adapter, or a dictionary
            of callbacks by adapter name. It monitors the metric's own name (``"val_loss"``). An adapter that has
            stopped leaves the batch.
        save_to: a folder to which the adapters are saved after the fit, each in a subfolder with its name.

    Raises:
        MisconfigurationException: at the start of a fit, or in its first two steps, if an adapter would not end with
            the values that it would have alone: active dropout or other random numbers, batch norm in training mode,
            rows that influence one another. Also raised for fewer than two methods, manual optimization, several
            devices, compiled modules, ``precision="16-mixed"``, methods that unfreeze the base step by step, and
            callbacks that need one active adapter.

    Example::

        methods = [lp.LoRA(r=4, name="small"), lp.LoRA(r=16, name="large")]
        together = lp.TrainTogether(hparams={"small": {"lr": 1e-3}, "large": {"lr": 3e-4}}, save_to="adapters")
        trainer = L.Trainer(callbacks=[*methods, together])
    """

    def __init__(
        self,
        hparams: Mapping[str, Mapping[str, Any]] | None = None,
        early_stopping: EarlyStopping | Mapping[str, EarlyStopping] | None = None,
        save_to: str | Path | None = None,
    ) -> None:
        self.hparams = {name: dict(values) for name, values in (hparams or {}).items()}
        self.early_stopping = early_stopping
        self.save_to = save_to
        self.names: list[str] = []
        self._stoppers: dict[str, EarlyStopping] = {}
        self._stopped: set[str] = set()
        self._frozen: list[nn.Parameter] = []  # of the adapters that have stopped
        self._meeting: Meeting | None = None
        self._views: dict[str, Any] = {}
        self._batch: Any = None
        self._outputs: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        methods = [c for c in trainer.callbacks if hasattr(c, "plan") and hasattr(c, "config")]
        self.names = [method.name for method in methods]
        if len(methods) < 2:
            raise CannotTrainTogether(
                f"it needs at least two methods among the Trainer's callbacks, each with its own name=, got "
                f"{self.names}"
            )
        stoppers = self.early_stopping if isinstance(self.early_stopping, Mapping) else {}
        for what, given in (("hparams", self.hparams), ("early_stopping", stoppers)):
            if unknown := sorted(set(given) - set(self.names)):
                raise CannotTrainTogether(f"{what} names {unknown}, but the methods are named {self.names}")
        self._views, self._meeting, self._stopped = {}, None, set()
        self._refuse(trainer, pl_module)
        prepare_run(trainer, pl_module)
        for method in methods:
            vars(method)["plan"] = functools.partial(_plan_with_own_values, method)
        vars(pl_module)["_peft_together"] = self
        for step, mixin in OPTIONAL.items():
            if step == "predict_step" or is_overridden(step, pl_module):
                add_mixin(pl_module, mixin)
        add_mixin(pl_module, TogetherModule)
        if stage == "fit":
            self._stoppers = {name: self._stopper(name, trainer, pl_module, stage) for name in self._stopping(methods)}

    def _stopping(self, methods: list[Any]) -> list[str]:
        given = self.early_stopping
        names = list(given) if isinstance(given, Mapping) else [] if given is None else self.names
        hooks = ("on_train_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
        for method in methods:
            if method.name in names and any(getattr(type(method), h) is not getattr(Callback, h) for h in hooks):
                raise CannotTrainTogether(
                    f"early_stopping is not supported for {method.name!r}: {type(method).__name__} changes its adapter "
                    "during the run. Pass early_stopping for the other adapters only"
                )
        return names

    def _stopper(self, name: str, trainer: Any, module: Any, stage: str) -> EarlyStopping:
        given: Any = self.early_stopping
        stopper = copy.deepcopy(given[name] if isinstance(given, Mapping) else given)
        stopper.monitor = f"{name}/{stopper.monitor}"
        stopper.setup(trainer, module, stage)
        return stopper

    def _refuse(self, trainer: Any, module: Any) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, lightning_classes("strategies.SingleDeviceStrategy")):
            raise CannotTrainTogether(f"{type(strategy).__name__} is not supported: use one device")
        if not module.automatic_optimization:
            raise CannotTrainTogether(
                "manual optimization is not supported, because each adapter has its own optimizer"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise CannotTrainTogether(
                "precision='16-mixed' is not supported: an overflow of one adapter would skip the step of all. Use "
                "'bf16-mixed'"
            )
        kinds = (CacheFrozen, Retention, *lightning_classes("callbacks.WeightAveraging"))
        if other := [type(c).__name__ for c in trainer.callbacks if isinstance(c, kinds)]:
            raise CannotTrainTogether(f"{other[0]} is not supported here, because it works with one active adapter")
        if is_compiled(module):
            raise CannotTrainTogether("compiled modules are not supported, because steps meet inside the forward")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        owned = {id(p) for stack in stacks(pl_module).values() for p in stack.parameters()}
        if shared := [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in owned]:
            raise CannotTrainTogether(
                f"{listed(shared)} would train for all adapters at once: freeze them before the fit, or name them in "
                "trainable of each method that needs them"
            )
        with rows(pl_module, self.names):  # raises an error if rows cannot name these adapters
            pass
        set_active(pl_module)
        optimizer: SideBySide = trainer.optimizers[0]
        optimizer.stopped = self._stopped

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loaders = getattr(trainer.train_dataloader, "iterables", trainer.train_dataloader)
        if self._per_adapter(loaders):
            sizes = {name: len(loader) for name, loader in loaders.items() if hasattr(loader, "__len__")}
            if len(set(sizes.values())) > 1:
                raise CannotTrainTogether(
                    f"the adapters have different numbers of batches: {sizes}. Alone, each would have epochs of its "
                    "own length: give each adapter the same number"
                )
        for name in sorted(self._stopped):
            self._stop(trainer, name)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._look("on_train_epoch_end", trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._look("on_validation_end", trainer, pl_module)

    def _look(self, hook: str, trainer: Any, module: Any) -> None:
        """Ask each adapter's early stopping whether it stops now."""
        for name, stopper in self._stoppers.items():
            if name not in self._stopped:
                asked = _Asked(trainer)
                getattr(stopper, hook)(asked, module)
                if asked.should_stop:
                    self._stop(trainer, name)
        if len(self._stopped) == len(self.names):
            trainer.should_stop = True

    def _stop(self, trainer: Any, name: str) -> None:
        self._stopped.add(name)
        part = trainer.optimizers[0].parts[name]
        for group in part.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    self._frozen.append(parameter.requires_grad_(False))
                parameter.grad = None
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is part:
                config.frequency = 2**62  # never, because its metric is no longer logged

    def _unfreeze_stopped(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._unfreeze_stopped()
        if self.save_to is not None:
            for write in adapter_writers:
                write(pl_module, str(self.save_to))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Any, module: Any) -> None:
        self._unfreeze_stopped()  # after an error, on_fit_end is not called
        for callback in trainer.callbacks:
            if hasattr(callback, "plan"):
                vars(callback).pop("plan", None)
        if self._meeting is not None:
            remove_mixin(self._meeting.point, MeetingPoint)
            vars(self._meeting.point).pop("_peft_meeting", None)
        for mixin in (TogetherModule, *OPTIONAL.values()):
            remove_mixin(module, mixin)
        vars(module).pop("_peft_together", None)
        self._views, self._meeting, self._batch, self._outputs = {}, None, None, {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "stopped": sorted(self._stopped),
            "early_stopping": {name: stopper.state_dict() for name, stopper in self._stoppers.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped.update(name for name in state_dict["stopped"] if name in self._stoppers)
        for name, state in state_dict["early_stopping"].items():
            if name in self._stoppers:
                self._stoppers[name].load_state_dict(state)

    def values_of(self, name: str) -> Mapping[str, Any]:
        """Return the hyperparameters of one adapter."""
        return self.hparams.get(name, {})

    def views(self, module: Any) -> dict[str, Any]:
        """Return the module's view of each adapter that has not stopped."""
        if not self._views:
            self._meeting = Meeting(module)
            vars(self._meeting.point)["_peft_meeting"] = self._meeting
            add_mixin(self._meeting.point, MeetingPoint)
            self._views = {name: make_view(module, name, self.values_of(name)) for name in self.names}
        for view in self._views.values():
            vars(view)["training"] = module.training  # not train(), which would change the modules that views share
        return {name: view for name, view in self._views.items() if name not in self._stopped}

    def only(self, name: str) -> AbstractContextManager[None]:
        """Inside the context, only the adapter ``name`` is active. :meth:`views` must have been called."""
        assert self._meeting is not None
        return self._meeting.only(name)

    def train(self, module: Any, batch: Any, batch_idx: int = 0) -> Tensor | None:
        """Run the training step of each adapter, and return the sum of the losses."""
        views = self.views(module)
        assert self._meeting is not None
        check = batch_idx < 2  # also the second, because adapters often start with no effect
        if check:
            _refuse_modes(self._meeting)
        steps = {
            name: (lambda view=view, name=name: call_hook(view, "training_step", self.part(batch, name), batch_idx))
            for name, view in views.items()
        }
        with self.in_batch(batch):
            self._outputs = self._meeting.run(steps, check)
        losses = [o["loss"] if isinstance(o, Mapping) else o for o in self._outputs.values() if o is not None]
        return sum(losses[1:], losses[0]) if losses else None  # the gradients of different adapters do not mix

    @contextmanager
    def in_batch(self, batch: Any) -> Iterator[None]:
        """Inside the context, steps run on ``batch``."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def batch_of(self, name: str) -> Any:
        """Return the batch of one adapter, if each has its own; None otherwise."""
        return self._batch[name] if self._per_adapter(self._batch) else None

    def part(self, batch: Any, name: str) -> Any:
        """Return the part of ``batch`` for one adapter: all of it, unless its keys are the adapters' names."""
        return batch[name] if self._per_adapter(batch) else batch

    def each_part(self, batch: Any, call: Callable[[Any], Any]) -> Any:
        """Call ``call`` with ``batch``, or with each adapter's part of it."""
        return {name: call(part) for name, part in batch.items()} if self._per_adapter(batch) else call(batch)

    def output_of(self, outputs: Any, name: str) -> Any:
        """Return the output of one adapter's step."""
        if not isinstance(outputs, Mapping) or not self._per_adapter(outputs):
            own = self._outputs.get(name)
            return own if isinstance(own, Mapping) or own is None else {"loss": own}
        return outputs.get(name)

    def _per_adapter(self, value: Any) -> bool:
        return isinstance(value, Mapping) and set(value) == set(self.names)


def _plan_with_own_values(method: Any, model: nn.Module) -> Plan:
    """Plan ``method``; its adapter gets copies of the base parameters that it trains, as a loaded adapter has."""
    plan: Plan = type(method).plan(method, model)
    if plan.deferred:
        raise CannotTrainTogether(
            f"{type(method).__name__} unfreezes the base during the run, and all adapters share the base"
        )
    parameters = base_parameters(model, remove_duplicate=False)
    own = {n: p for n, p in parameters if n in plan.train or (plan.train_modules and is_within(n, *plan.train_modules))}
    if own:
        override_trained(plan, model, own, trainable=True)
    return plan


class _Asked:
    """The Trainer as one adapter's early stopping sees it: asking one adapter to stop does not stop the others."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.should_stop = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _refuse_modes(meeting: Meeting) -> None:
    """Refuse modules whose random numbers or batch statistics would differ from those of one adapter trained alone."""
    for inner, module in base_modules(meeting.point):
        name = join(meeting.where, inner)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise CannotTrainTogether(
                f"the dropout {name!r} is active, and its random numbers would not be those that one adapter alone "
                "draws: set p=0, or call eval() on the base before the fit"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise CannotTrainTogether(
                f"the batch norm {name!r} is in training mode, so rows of different adapters would influence one "
                "another: keep it in eval mode"
            )
