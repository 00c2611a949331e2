"""Read optional properties of a model without exceptions.

Models of transformers inherit methods and configuration properties that raise if they do not apply:
``get_input_embeddings`` of a ResNet raises NotImplementedError. The functions here return None instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["config_value", "input_embedding", "label_names", "output_embedding"]


def input_embedding(module: nn.Module) -> nn.Module | None:
    """Return ``module.get_input_embeddings()``, or None if the method is missing or raises."""
    return _call_or_none(module, "get_input_embeddings")


def output_embedding(module: nn.Module) -> nn.Module | None:
    """Return ``module.get_output_embeddings()``, or None if the method is missing or raises."""
    return _call_or_none(module, "get_output_embeddings")


def config_value(config: object, name: str, default: Any = None) -> Any:
    """Return an attribute of a configuration; ``default`` if it is missing, None, or a property that raises."""
    try:
        value = getattr(config, name, None)
    except Exception:  # a property of the user's or transformers' configuration may raise anything
        return default
    return default if value is None else value


def label_names(config: object) -> list[str] | None:
    """Return the names of a classifier's outputs in order; None if they are missing, or only transformers'
    ``LABEL_0``."""
    names = config_value(config, "id2label")
    if (
        not isinstance(names, dict)
        or not names
        or any(names.get(i, f"LABEL_{i}") == f"LABEL_{i}" for i in range(len(names)))
    ):
        return None
    return [str(names[i]) for i in range(len(names))]


def _call_or_none(module: nn.Module, method: str) -> nn.Module | None:
    try:
        answer = getattr(module, method)()
    except Exception:  # NotImplementedError, or AttributeError because of a layer that this model does not have
        return None
    return answer if isinstance(answer, nn.Module) else None
