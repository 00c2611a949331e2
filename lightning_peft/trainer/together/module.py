"""Give each adapter its own view of a LightningModule, and its own optimizer."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import add_mixin, original_class, remove_mixin
from lightning_peft.trainer.together.meeting import CannotTrainTogether

__all__ = ["OPTIONAL", "SideBySide", "TogetherModule", "call_hook", "make_view"]

if TYPE_CHECKING:
    import lightning as L

    _LightningModule = L.LightningModule
else:
    _LightningModule = nn.Module  # the user's module may come from lightning or pytorch_lightning


class SideBySide(Optimizer):
    """The optimizers of several adapters, which take their steps together.

    Args:
        parts: the optimizer of each adapter, by the adapter's name.
    """

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        self.parts = dict(parts)
        self.stopped: set[str] = set()
        super().__init__([{"params": []}], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        # Not stored, because load_state_dict of a part replaces its groups.
        return [group for part in self.parts.values() for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        pass  # torch's __init__ sets it; the parts hold the groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        return defaultdict(dict, {key: value for part in self.parts.values() for key, value in part.state.items()})

    @state.setter
    def state(self, state: Any) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group["params"]:
            raise CannotTrainTogether("a parameter group cannot be added, because each adapter has its own optimizer")

    def __eq__(self, other: object) -> bool:
        # Lightning requires that the optimizer of each scheduler is one that configure_optimizers returned.
        return self is other or any(part is other for part in self.parts.values())

    __hash__ = object.__hash__

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for name, part in self.parts.items():
            if name not in self.stopped:
                part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"adapters": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("adapters", {})
        if saved.keys() != self.parts.keys():
            raise CannotTrainTogether(
                f"the checkpoint has optimizers for {sorted(saved) or 'one run'}, but these adapters train: "
                f"{sorted(self.parts)}. Resume with the adapters that the checkpoint was saved with"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])


class View(_LightningModule):
    """Mixin for one adapter's view of the module: a shallow copy with own metrics, lists and hyperparameters."""

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        module, adapter = self.__dict__["_peft_view"]
        if isinstance(value, nn.Module):  # a metric
            kwargs.setdefault("metric_attribute", name)  # Lightning would look for it among the module's own metrics
        if kwargs.get("batch_size") is None and (batch := module._peft_together.batch_of(adapter)) is not None:
            kwargs["batch_size"] = extract_batch_size(batch)
        module.log(f"{adapter}/{name}", value, *args, **kwargs)


def make_view(module: Any, adapter: str, values: Mapping[str, Any]) -> Any:
    """Return the view of ``module`` in which the steps of ``adapter`` run, with ``values`` as its hyperparameters."""
    view = copy.copy(module)
    for mixin in (TogetherModule, *OPTIONAL.values()):
        remove_mixin(view, mixin)
    add_mixin(view, View)
    own = vars(view)
    own["_trainer"], own["_peft_view"] = module._trainer, (module, adapter)
    own.pop("_peft_together", None)
    for key, value in own.items():
        if type(value) in (list, dict, set) and not key.startswith("_"):
            own[key] = copy.copy(value)
    own["_modules"] = {n: copy.deepcopy(m) if _is_metric(m) else m for n, m in module._modules.items()}
    set_values(view, values)
    return view


def _is_metric(module: nn.Module | None) -> bool:
    """Whether a child of the user's module is a metric, or holds nothing but metrics."""
    from torchmetrics import Metric

    return (
        module is not None
        and any(isinstance(m, Metric) for m in module.modules())
        and next(module.parameters(), None) is None
    )


def set_values(view: Any, values: Mapping[str, Any]) -> None:
    """Set hyperparameters of a view where its module has them: in ``hparams``, as attributes, or both."""
    own = vars(view)
    own["_hparams"] = copy.copy(view.hparams)
    for key, value in values.items():
        here = key in own["_hparams"]
        if here:
            own["_hparams"][key] = value
        if key in own:
            own[key] = value
        elif not here:
            raise CannotTrainTogether(
                f"hparams names {key!r}, which is neither a hyperparameter nor an attribute of {type(view).__name__}: "
                f"it has {sorted(own['_hparams'])}"
            )


class TogetherModule(_LightningModule):
    """Mixin for the module that trains: it runs each step and each hook once for each adapter."""

    def configure_optimizers(self) -> Any:
        together = self.__dict__["_peft_together"]
        parts, schedulers = {}, []
        for name in together.names:
            with _only(self, name), _with_values(self, together.values_of(name)):
                optimizers, found, monitor = _configure_optimizers(super().configure_optimizers())  # type: ignore[arg-type]
            _check_optimizer(optimizers)
            parts[name] = optimizers[0]
            for scheduler in found:
                config = dict(scheduler) if isinstance(scheduler, dict) else {"scheduler": scheduler}
                config.setdefault("monitor", monitor)
                if config["monitor"] is not None:
                    config["monitor"] = f"{name}/{config['monitor']}"
                schedulers.append({"name": f"lr-{name}", **config})
        return [SideBySide(parts)], schedulers

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        joined: Any = self.trainer.optimizers[0]
        for part in joined.parts.values():  # separately, because the norm of one must not affect another
            super().configure_gradient_clipping(part, *args, **kwargs)

    def training_step(self, *args: Any) -> Any:
        return self.__dict__["_peft_together"].train(self, *args)


def _evaluation(step: str) -> Callable[..., Any]:
    def run(self: Any, batch: Any, *args: Any) -> dict[str, Any]:
        together = self.__dict__["_peft_together"]
        outputs = {}
        for name, view in together.views(self).items():
            with together.only(name), together.in_batch(batch):
                outputs[name] = call_hook(view, step, together.part(batch, name), *args)
        return outputs

    run.__name__ = step
    return run


def _transfer(hook: str) -> Callable[..., Any]:
    def run(self: Any, batch: Any, dataloader_idx: int) -> Any:
        call = getattr(original_class(self), hook)
        return self.__dict__["_peft_together"].each_part(batch, lambda part: call(self, part, dataloader_idx))

    run.__name__ = hook
    return run


def _hook(hook: str, batch_at: int | None, outputs: bool = False) -> Callable[..., Any]:
    """Return a hook that runs in each view, with the part of the batch and the output of its adapter."""

    def run(self: Any, *args: Any) -> Any:
        together = self.__dict__["_peft_together"]
        if getattr(original_class(self), hook).__module__.startswith(("lightning.pytorch.", "pytorch_lightning.")):
            return None  # the module has no such hook of its own
        found = []
        for name, view in together.views(self).items():
            own = list(args)
            if batch_at is not None:
                own[batch_at] = together.part(args[batch_at], name)
            if outputs:
                own[0] = together.output_of(args[0], name)
            with together.only(name):
                found.append(call_hook(view, hook, *own))
        if hook == "on_train_batch_start" and -1 in found:
            if found.count(-1) < len(found):
                raise CannotTrainTogether("on_train_batch_start skips the batch for some adapters only")
            return -1
        return None

    run.__name__ = hook
    return run


for _stage in ("train", "validation", "test", "predict"):
    for _name in (f"on_{_stage}_start", f"on_{_stage}_epoch_start", f"on_{_stage}_epoch_end", f"on_{_stage}_end"):
        setattr(TogetherModule, _name, _hook(_name, None))
    setattr(TogetherModule, f"on_{_stage}_batch_start", _hook(f"on_{_stage}_batch_start", 0))
    setattr(TogetherModule, f"on_{_stage}_batch_end", _hook(f"on_{_stage}_batch_end", 1, outputs=True))


#: mixins for methods that only some modules have: if the module has them, Lightning runs a validation, or skips the
#: hooks of a data module
OPTIONAL = {
    name: type(f"Together_{name}", (nn.Module,), {name: make(name)})
    for make, names in (
        (_evaluation, ("validation_step", "test_step", "predict_step")),
        (_transfer, ("on_before_batch_transfer", "on_after_batch_transfer")),
    )
    for name in names
}


def call_hook(view: Any, hook: str, *args: Any) -> Any:
    """Call a hook of a view with as many of the arguments as it takes, as Lightning does."""
    function = getattr(view, hook)
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        args = args[: len(parameters)]
    return function(*args)


@contextmanager
def _only(model: nn.Module, name: str) -> Any:
    """Inside the context, only the parameters of the adapter ``name`` require gradients."""
    others = [
        p
        for stack in stacks(model).values()
        for other, adapter in stack.items()
        if other != name
        for p in adapter.parameters()
        if p.requires_grad
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _with_values(module: Any, values: Mapping[str, Any]) -> Any:
    """Inside the context, the module has ``values`` as its hyperparameters."""
    before = {key: vars(module)[key] for key in values if key in vars(module)}
    before["_hparams"] = module.hparams
    try:
        set_values(module, values)
        yield
    finally:
        vars(module).update(before)


def _check_optimizer(optimizers: list[Any]) -> None:
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    if len(optimizers) != 1 or not isinstance(optimizers[0], Optimizer):
        raise CannotTrainTogether(f"configure_optimizers must return one torch optimizer, it returned {kinds}")
    closure = inspect.signature(type(optimizers[0]).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise CannotTrainTogether(f"{kinds[0]} calls training_step several times in one step: use another optimizer")
