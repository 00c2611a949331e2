"""A module that a command names by its class: ``--model my.package.Module --model.width=16``."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["build_arguments", "find_module"]


def find_module(name: str) -> type[L.LightningModule]:
    """The class called ``name``: with its package, or the last part alone where it is one of this package's tasks.

    Raises:
        MisconfigurationException: there is none, or it is no LightningModule.
    """
    package, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(package or "lightning_peft.tasks"), last)
    except (ImportError, AttributeError) as error:
        raise MisconfigurationException(f"--model {name}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, L.LightningModule):
        raise MisconfigurationException(f"--model {name} is no LightningModule but {found!r}")
    return found


def build_arguments(parser: ArgumentParser, rest: Sequence[str]) -> dict[str, Any]:
    """The arguments ``--model.<name>=<value>`` (or with a space) by name, values read as YAML."""
    import yaml

    found: dict[str, Any] = {}
    left = list(rest)
    while left:
        key, equals, value = left.pop(0).partition("=")
        if not key.startswith("--model.") or not (equals or left):
            parser.error(f"unknown argument {key}")
        found[key.removeprefix("--model.")] = yaml.safe_load(value if equals else left.pop(0))
    return found
