"""Keep adapters and trained modules in training mode during a fit, even if the modules around them are in eval mode.

Lightning does not change the modes of the user's modules, and ``from_pretrained`` returns a model in eval mode. An
adapter in eval mode would train without its dropout, rank sampling and stochastic depth.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.names import is_within
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.state.freezing import FrozenNorm
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = ["TrainingMode"]


class TrainingMode:
    """Sets the trainable adapters and fully trained modules of ``model`` to training mode, and back.

    Args:
        model: The adapted module; its report lists the frozen modules that are in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [adapter for stack in stacks(model).values() for adapter in stack.values()]
        record = injection_state(model)
        if record is not None:
            root = injected_module(model)
            found += [root.get_submodule(name) for trains in record.trained_base.values() for name in trains.modules]
            found = [module for module in found if any(p.requires_grad for p in module.parameters())]
            record.report.in_eval_mode = _in_eval_mode(model, found)
        self._modules = found
        self._before: dict[nn.Module, bool] = {}

    def enter(self) -> None:
        """Set everything that trains to training mode. This is cheap if it already is."""
        for module in self._modules:
            if not module.training and not has_mixin(module, FrozenNorm):
                self._before = {**{m: m.training for m in module.modules()}, **self._before}
                module.train()

    def leave(self) -> None:
        """Restore the mode of every module that :meth:`enter` changed."""
        for module, mode in self._before.items():
            module.training = mode  # not train(mode), which would change the children too
        self._before = {}


def _in_eval_mode(model: nn.Module, trained: list[nn.Module]) -> list[str]:
    """The names of the outermost modules that are in eval mode and hold frozen parameters."""
    inside = {part for module in trained for part in module.modules()}
    found: list[str] = []
    for name, module in base_modules(model):
        if is_within(name, *found):
            continue
        frozen = any(not p.requires_grad for p in module.parameters())
        if not module.training and frozen and module not in inside and not has_mixin(module, FrozenNorm):
            found.append(name)
    return found
