"""The record of what methods have done to a model, stored on the module that they were applied to."""

from __future__ import annotations

from collections import Counter
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
    "preparations",
    "trainable_parameters",
]


@dataclass(frozen=True)
class TrainedBase:
    """What one method trains in the base, by name in the module that methods were applied to.

    Attributes:
        modules: names of modules that train in full.
        parameters: names of single parameters, including those that train only later in the run.
        adapters: whether the method's adapters train; those of a loaded adapter may be frozen.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    adapters: bool = False

    def __bool__(self) -> bool:
        return bool(self.modules or self.parameters or self.adapters)


@dataclass
class InjectionState:
    """Everything that was inserted into a model. It is stored on the model itself.

    Attributes:
        methods: the methods by adapter name, in order.
        report: counts and table.
        fingerprint: identifies the frozen base (:func:`lightning_peft.core.state.fingerprint.fingerprint`).
        start: initial values of the base, to detect which ones change without gradients.
        trained_before: names of the base parameters that required gradients before methods were applied.
        deferred: maps the names of parameters that train later to None, or to their initial values once they train.
        trained_base: what each method trains in the base, by adapter name.
        also_trained: names of base parameters that train although no current method trains them, because the user
            unfroze them before the fit or their method was deleted.
        moved: names of frozen values that have changed since the start; they stay part of the state.
        hosts: names of the modules that carry each method's adapters, by adapter name.
        adapter_records: the place and layer of each method's adapters, without tensors, by adapter name.
        origins: options from the files that adapters were loaded from, to be written again, by adapter name.
        carried: the number of adapters on each module, by name.
        shapes: how many adapters were created for a weight of some shape, by module, weight and shape.
        sizes: for each adapter, the number of its parameters that train and of all its parameters, by adapter name.
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
    carried: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[str, str, tuple[int, ...]]] = field(default_factory=Counter)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_adapter(
        self, name: str, hosts: tuple[str, ...], records: list[AdapterRecord], size: tuple[int, int]
    ) -> None:
        """Record where the adapter ``name`` is, and its size."""
        self.hosts[name], self.adapter_records[name], self.sizes[name] = hosts, records, size
        self.carried.update(hosts)
        self.shapes.update((r.host, r.parameter, tuple(r.shape)) for r in records)

    def remove_adapter(self, name: str) -> None:
        """Forget where the adapter ``name`` is."""
        self.sizes.pop(name, None)
        self.carried -= Counter(self.hosts.pop(name, ()))
        records = self.adapter_records.pop(name, ())
        self.shapes -= Counter((r.host, r.parameter, tuple(r.shape)) for r in records)

    def trained_among(self, names: Iterable[str]) -> set[str]:
        """Return those of the base parameters ``names`` that train now, whether or not they require gradients."""
        modules = {name for trained in self.trained_base.values() for name in trained.modules}
        single = {name for trained in self.trained_base.values() for name in trained.parameters} | self.also_trained
        waiting = {name for name, before in self.deferred.items() if before is None}
        return {n for n in names if (n in single and n not in waiting) or is_within(n, *modules)}


def injection_state(model: nn.Module) -> InjectionState | None:
    """Return the record of ``model``, or of the adapted module inside it; None if there is none."""
    return vars(injected_module(model)).get("_peft_injection")


def injected_module(model: nn.Module) -> nn.Module:
    """Return the module that methods were applied to, whose names the record uses; ``model`` if there is none."""
    name = injected_name(model)
    return model.get_submodule(name) if name else model


def injected_name(model: nn.Module) -> str:
    """Return the name of the module that methods were applied to: ``""`` for ``model`` itself, or one inside it."""
    return next((name for name, module in model.named_modules() if "_peft_injection" in vars(module)), "")


def preparations(model: nn.Module) -> list[dict[str, Any]]:
    """Return what was done to the base before methods were applied: the class and the arguments of each preparation."""
    return [entry for module in model.modules() for entry in vars(module).get("_peft_prepared", ())]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters for the optimizer: those that require gradients now, or will later in the run."""
    deferred = {id(p) for p in deferred_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad or id(p) in deferred]


def deferred_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that start frozen and train later in the run, including those that already train."""
    record = injection_state(model)
    return [] if record is None else [injected_module(model).get_parameter(name) for name in record.deferred]
