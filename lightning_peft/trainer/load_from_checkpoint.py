"""``lp.load_from_checkpoint``: build a trained module from its checkpoint, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

from lightning_peft.core.injection.apply import apply, install
from lightning_peft.core.injection.overrides import override_trained, saved_overrides
from lightning_peft.core.record import injection_state
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.state.plan import Method
from lightning_peft.core.state.torch_file import naming
from lightning_peft.core.switching.active import set_active
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.untrusted import limits_of
from lightning_peft.trainer.brought_along import adapt_around
from lightning_peft.trainer.checkpoints.hyperparameters import saved_arguments
from lightning_peft.trainer.checkpoints.manifest import KEY, read_checkpoint
from lightning_peft.trainer.lazy_modules import create_lazy_parameters

__all__ = ["load_from_checkpoint"]

M = TypeVar("M", bound=L.LightningModule)


def load_from_checkpoint(
    module_class: type[M], path: str | Path, map_location: Any = "cpu", weights_only: bool = True, **kwargs: Any
) -> M:
    """Build the module, inject the checkpoint's adapters and load the trainable state.

    ``module_class`` builds the base with the saved hyperparameters: ``__init__``, ``configure_model``, and
    ``setup("predict")`` if the layers do not exist earlier. A saved hyperparameter that names code (a class path, or a
    value for an argument that takes objects) is never used: pass it as an argument.

    Args:
        module_class: The class that was trained.
        path: A checkpoint written by a Trainer with methods attached.
        map_location: The device to load the tensors to.
        weights_only: Read tensors and plain values only. With False, hyperparameters of any type are read, and any code
            that the file names runs: use it only for files that you trust.
        **kwargs: Arguments of ``module_class``; they override and complete the saved hyperparameters.

    Returns:
        The module with its adapters, on ``map_location``.

    Raises:
        StateError: if the checkpoint has no manifest, does not fit the module, was trained on another base, or would
            run code; if a hyperparameter names code and was not passed; or if a method is not defined here.
    """
    checkpoint = read_checkpoint(path, map_location, weights_only=weights_only)
    with naming(path):
        methods = [
            (_method(entry), entry.get("trains", True), _has_overrides(entry)) for entry in checkpoint[KEY]["methods"]
        ]
        steps = [_method(entry) for entry in checkpoint[KEY]["fingerprint"].get("prepared", ())]
    arguments = saved_arguments(module_class, checkpoint, kwargs, path, trusted=not weights_only)
    with naming(path) if arguments else nullcontext():
        module = module_class(**arguments, **kwargs)
    # A configure_model that calls lp.apply(self) without methods finds them here, as it would on a Trainer.
    module.__dict__["_peft_methods"] = [
        *steps,
        *(method for method, trains, copies in methods if trains and not copies),
    ]
    module.configure_model()
    create_lazy_parameters(module)
    with naming(path):
        try:
            _install_saved(module, steps, methods, checkpoint["state_dict"])
        except TargetError:  # the layers may be created in setup, which expects a Trainer and so is only tried now
            module.setup("predict")
            create_lazy_parameters(module)
            _install_saved(module, steps, methods, checkpoint["state_dict"])
        del module.__dict__["_peft_methods"]
        adapt_around(module)
        if _in_double(checkpoint["state_dict"]) - _in_double(module.state_dict()):
            module.double()  # the run used precision="64-true"; loading into float32 would round the values
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        if not all(trains for _, trains, _ in methods):
            set_active(module, *checkpoint[KEY]["active"])
    return module.to(map_location) if isinstance(map_location, str | torch.device) else module


def _method(entry: dict[str, Any]) -> Method:
    return method_of_file(entry["method"], entry["config"])


def _in_double(state: Mapping[str, Any]) -> set[str]:
    return {key for key, value in state.items() if getattr(value, "dtype", None) is torch.float64}


def _has_overrides(entry: dict[str, Any]) -> bool:
    """Whether the method's heads and biases override those of the base, as in a loaded adapter."""
    return entry.get("copies", not entry.get("trains", True))


def _install_saved(
    module: L.LightningModule,
    steps: Sequence[Any],
    methods: Iterable[tuple[Method, bool, bool]],
    state: dict[str, Tensor],
) -> None:
    """Prepare the base, and inject the methods in order, each as in the run: training in place, or with overrides."""
    for step in steps:
        limits_of(step.config(), module, state)  # for its patterns only: it allocates a copy of the base
        apply(module, step)
    for method, trains, copies in methods:
        # The file's configuration decides how much is allocated and which patterns run, so both are limited: sizes by
        # the tensors that the file really has, patterns to those that cannot take exponential time.
        limits = limits_of(method.config(), module, state)
        record = injection_state(module)
        if trains and not copies:
            with limits:
                apply(module, method)
        elif record is None or method.name not in record.methods:
            with limits:
                plan = method.plan(module)
            override_trained(plan, module, saved_overrides(plan, module, method.name, state), trains)
            for attachment in plan.attach if not trains else ():
                attachment.adapter.requires_grad_(False)
            install(module, {method.name: (method, plan)})
