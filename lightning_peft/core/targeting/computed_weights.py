"""Read and write weights that a module computes from other parameters: weight norm, spectral norm, pruning, ...

There are two kinds. A parametrization (``torch.nn.utils.parametrize``) gives the module's class a property that
computes the weight in each read. A hook (``torch.nn.utils.weight_norm``, ``spectral_norm``, ``prune``) computes it
before each call of the module and stores it as a plain attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import join, leaf, owner_of
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = [
    "computed_names",
    "computed_value",
    "effective_tensors",
    "is_computed",
    "moving_parts",
    "plain_class",
    "refresh",
    "sources_of",
    "steady",
    "steady_tensor",
    "stored_tensor",
    "write_computed",
]


def stored_tensor(host: nn.Module, name: str) -> Tensor | None:
    """Return the parameter, buffer or computed weight ``name`` of a host; the name may lead to a child. None if
    missing.

    Adapters are not applied to it.
    """
    *children, last = name.split(".")
    module = host
    for child in children:
        module = module._modules[child]  # type: ignore[assignment]  # the attribute may be a _Projection at this time
    for kind in (module._parameters, module._buffers):
        if last in kind:
            return kind[last]
    return computed_value(module, last)


def steady_tensor(host: nn.Module, name: str) -> Tensor | None:
    """Return :func:`stored_tensor`, computed as in evaluation mode, so that no buffer changes."""
    if not is_computed(host, name):
        return stored_tensor(host, name)
    with steady(host.get_submodule(owner_of(name))):
        return stored_tensor(host, name)


def computed_names(module: nn.Module) -> list[str]:
    """Return the names of the tensors that ``module`` computes from its other parameters."""
    found = list(module._modules["parametrizations"]) if parametrize.is_parametrized(module) else []  # type: ignore
    if _hooks(module):
        tensors = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
        found += [name for name in tensors if any(key.startswith(f"{name}_") for key in module._parameters)]
    return found


def is_computed(host: nn.Module, name: str) -> bool:
    """Whether the tensor ``name`` of a host or its child is computed from other parameters."""
    return leaf(name) in computed_names(host.get_submodule(owner_of(name)))


def computed_value(module: nn.Module, name: str) -> Tensor | None:
    """Return the tensor ``name`` that ``module`` computes; None if it does not compute one.

    If a hook computes the tensor, it is the value from the module's last call.
    """
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
        return parametrizations[name]()
    value = vars(module).get(name)
    return value if isinstance(value, Tensor) else None


def plain_class(module: nn.Module) -> type:
    """Return the class of ``module`` without mixins and without the class that a parametrization puts before it."""
    cls = original_class(module)
    return cls.__mro__[1] if parametrize.is_parametrized(module) else cls


def effective_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the parameters of ``module`` by name, with computed tensors in place of what they are computed from."""
    if not (names := computed_names(module)):
        return dict(module._parameters)
    sources = {key for name in names for key in sources_of(module, name)}
    own = {key: value for key, value in module._parameters.items() if key not in sources}
    return {**{name: steady_tensor(module, name) for name in names}, **own}


def sources_of(module: nn.Module, name: str) -> list[str]:
    """Return the names of the parameters and buffers from which ``module`` computes its tensor ``name``."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    before = (f"parametrizations.{name}.",) if parametrize.is_parametrized(module, name) else (f"{name}_",)
    return [key for key in tensors if key.startswith(before)]


def moving_parts(module: nn.Module) -> list[tuple[nn.Module, list[Tensor]]]:
    """Return the modules whose buffers change in training when ``module`` computes a tensor, as in spectral norm.

    Each comes with the parameters that the tensor is computed from.
    """
    found: list[tuple[nn.Module, list[Tensor]]] = []
    for name in computed_names(module):
        if parametrize.is_parametrized(module, name):
            steps = module.get_submodule(f"parametrizations.{name}")
            moving = [step for step in steps.children() if any(True for _ in step.buffers())]
            found += [(step, list(steps.parameters())) for step in moving]
        elif any(getattr(hook, "name", None) == name for hook in _hooks(module)):
            sources = [key for key in sources_of(module, name) if key in module._parameters]
            if len(sources) < len(sources_of(module, name)):
                found.append((module, [module.get_parameter(key) for key in sources]))
    return found


@contextmanager
def steady(module: nn.Module) -> Iterator[None]:
    """Compute the tensors of ``module`` as in evaluation mode: in training, reading some of them changes buffers.

    The results of hooks are computed again when the context is entered.
    """
    computing = [part for _, part in base_modules(module) if computed_names(part)]
    steps = [step for part in computing if parametrize.is_parametrized(part) for step in _steps(part)]
    modes = {part: part.training for part in (*computing, *steps)}
    for part in modes:
        part.training = False
    try:
        for part in computing:
            for hook in _hooks(part):
                hook(part, ())
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def refresh(module: nn.Module) -> None:
    """Recompute the tensors that hooks of ``module`` compute, after their parameters have changed."""
    with steady(module):
        pass


@torch.no_grad()
def write_computed(host: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """Change the parameters and buffers from which the tensor ``name`` is computed, so that ``value`` results.

    Args:
        host: the module that holds the tensor, itself or in a child.
        name: its name, with the name of the child.
        value: the new value, in the stored shape and dtype.

    Returns:
        Copies of their previous values, by name in the host.

    Raises:
        ValueError: if no values of these parameters result in ``value``, up to rounding; nothing was changed.
    """
    path, owner, last = owner_of(name), host.get_submodule(owner_of(name)), leaf(name)
    before = {key: cast(Tensor, stored_tensor(owner, key)).detach().clone() for key in sources_of(owner, last)}
    try:
        _invert(owner, last, value)
        result = steady_tensor(owner, last)
        if result is None or not _reproduces(result, value):
            raise ValueError("no value of its parameters results in the merged weight")
    except Exception as error:  # a user's right_inverse may raise anything
        for key, kept in before.items():
            cast(Tensor, stored_tensor(owner, key)).copy_(kept)
        refresh(owner)
        raise ValueError(str(error).rstrip(".")) from error
    return {join(path, key): kept for key, kept in before.items()}


def _invert(module: nn.Module, name: str, value: Tensor) -> None:
    if parametrize.is_parametrized(module, name):
        getattr(original_class(module), name).fset(module, value)
        return
    norm = next((hook for hook in _hooks(module) if isinstance(hook, WeightNorm) and hook.name == name), None)
    if norm is None:
        module.get_parameter(f"{name}_orig").copy_(value)
    else:
        module.get_parameter(f"{name}_v").copy_(value)
        module.get_parameter(f"{name}_g").copy_(torch.norm_except_dim(value, 2, norm.dim))


def _reproduces(result: Tensor, value: Tensor) -> bool:
    """Whether two weights are equal up to the rounding of a norm and two products."""
    if result.shape != value.shape:
        return False
    eps = torch.finfo(value.dtype).eps * (2 if value.dtype.itemsize < 4 else 16)
    return bool((result - value).abs().max() <= eps * value.abs().max())


def _steps(module: nn.Module) -> list[nn.Module]:
    return list(module.get_submodule("parametrizations").modules())


def _hooks(module: nn.Module) -> list[Any]:
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if hasattr(hook, "compute_weight") or hasattr(hook, "apply_mask")]
