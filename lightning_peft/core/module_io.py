"""Read the arguments of a module's forward, and read and replace the hidden state in its output.

The hidden state is the first tensor of an output, which may be a tensor, tuple, mapping or ``ModelOutput``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class

__all__ = ["by_name", "first_tensor", "hidden_state", "parameters_of", "tensors_in", "with_hidden_state", "with_input"]


def first_tensor(args: Iterable[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the first floating-point tensor among the arguments of a call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield all tensors in ``value``: itself, or those in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def hidden_state(output: Any, where: str) -> Tensor:
    """Return the tensor in a module's output that adapters change.

    Raises:
        TypeError: if the first entry of the output is not a tensor.
    """
    first = output
    if isinstance(output, Mapping):
        first = output[_key(output)] if len(output) else None
    elif isinstance(output, tuple | list) and output:
        first = output[0]
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{where!r} returned a {type(output).__name__} whose first entry is {type(first).__name__}: an activation "
            "adapter needs a tensor, or a tuple or mapping whose first entry is a tensor. Exclude this module"
        )
    return first


def with_hidden_state(output: Any, new: Tensor) -> Any:
    """Return ``output`` with its hidden state replaced by ``new``; ``output`` itself is not changed."""
    if isinstance(output, Tensor):
        return new
    if dataclasses.is_dataclass(output) and isinstance(output, Mapping):
        return dataclasses.replace(output, **{_key(output): new})  # type: ignore[type-var]
    if isinstance(output, Mapping):
        return {**output, _key(output): new}
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: new})
    return type(output)((new, *output[1:]))


def with_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the first one, positional or keyword, replaced by ``change(first)``."""
    if args:
        return (change(args[0]), *args[1:]), dict(kwargs)
    name, value = next(iter(kwargs.items()))
    return (), {**kwargs, name: change(value)}


def _key(output: Mapping[str, object]) -> str:
    return "last_hidden_state" if "last_hidden_state" in output else next(iter(output))


def parameters_of(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module's forward."""
    return list(inspect.signature(original_class(module).forward).parameters)[1:]  # type: ignore[attr-defined]


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``module`` by parameter name."""
    return {**dict(zip(parameters_of(module), args)), **kwargs}
