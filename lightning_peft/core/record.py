"""The record of what methods have done to a model: it lives on the module that they were applied to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core.names import is_within

if TYPE_CHECKING:
    from lightning_peft.core.state.adapter_records import AdapterRecord
    from lightning_peft.core.state.moved_values import InitialValues
    from lightning_peft.core.state.plan import Method
    from lightning_peft.core.state.report import Report
__all__ = [
    "InjectionState",
    "TrainedBase",
    "deferred_parameters",
    "injected_module",
    "injected_name",
    "injection_state",
    "trainable_parameters",
]


@dataclass(frozen=True)
class TrainedBase:
    """What one method trains of the base itself, by name in the module that methods were applied to.

    Attributes:
        modules: modules that train in full.
        parameters: single parameters, those that train only later in the run included.
        adapters: whether the method's adapters train; those of a loaded adapter may be frozen.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    adapters: bool = False

    def __bool__(self) -> bool:
        return bool(self.modules or self.parameters or self.adapters)


@dataclass
class InjectionState:
    """The record of what was put into a model; it lives on the model itself.

    Attributes:
        methods: the methods by adapter name, in order.
        report: counts and table.
        fingerprint: what identifies the frozen base (:func:`lightning_peft.core.state.fingerprint.fingerprint`).
        start: the base's values as they were, to tell which ones change without gradients.
        trained_before: names of the base parameters that required gradients before.
        deferred: names of the parameters that train later; with the values they started from once they do.
        trained_base: what each method trains of the base itself, by adapter name.
        also_trained: names of base parameters that train although no method names them: those that the user unfroze
            before the fit, and those of a deleted method.
        moved: names of frozen values that have changed since the start; they stay part of the state.
        hosts: the modules that carry each method's adapters, by adapter name.
        adapter_records: where each method's adapters are and on what layers, without their tensors, by adapter name.
        origins: options of the files that adapters were read from, to be written again, by adapter name.
    """

    methods: dict[str, Method]
    report: Report
    fingerprint: dict[str, Any]
    start: InitialValues
    trained_before: frozenset[str]
    deferred: dict[str, Tensor | None] = field(default_factory=dict)
    trained_base: dict[str, TrainedBase] = field(default_factory=dict)
    also_trained: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    hosts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adapter_records: dict[str, list[AdapterRecord]] = field(default_factory=dict)
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)

    def trained_among(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` of base parameters that train by now, whether or not they require gradients."""
        modules = {name for trained in self.trained_base.values() for name in trained.modules}
        single = {name for trained in self.trained_base.values() for name in trained.parameters} | self.also_trained
        waiting = {name for name, before in self.deferred.items() if before is None}
        return {n for n in names if (n in single and n not in waiting) or is_within(n, *modules)}


def injection_state(model: nn.Module) -> InjectionState | None:
    """The record of ``model``, or of the one module inside it that methods were applied to."""
    return vars(injected_module(model)).get("_peft_injection")


def injected_module(model: nn.Module) -> nn.Module:
    """The module that methods were applied to, whose names the record uses; ``model`` itself where none were."""
    return model.get_submodule(injected_name(model))


def injected_name(model: nn.Module) -> str:
    """The name of the module that methods were applied to: ``model`` itself (``""``) or one inside it."""
    return next((name for name, module in model.named_modules() if "_peft_injection" in vars(module)), "")


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters an optimizer should get: those that require gradients, or will later in the run."""
    deferred = {id(p) for p in deferred_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad or id(p) in deferred]


def deferred_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that start frozen and train later in the run, whether or not they do by now."""
    record = injection_state(model)
    return [] if record is None else [injected_module(model).get_parameter(name) for name in record.deferred]
