"""A module that a command names by its class: ``--model my.package.Module --model.width=16``."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

import lightning_peft as lp
from lightning_peft.core.state import StateError
from lightning_peft.trainer.manifest import read_checkpoint
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["add_model_option", "build_module", "find_module", "load_module", "parse"]

_TASKS = "lightning_peft.tasks"


def add_model_option(parser: ArgumentParser, note: str, required: bool = False) -> None:
    """Add ``--model`` to a command, and say how its arguments are given; :func:`parse` takes them."""
    arguments = "its arguments are --model.width=16 and so on"
    parser.add_argument(
        "--model", metavar="CLASS", required=required, help=f"{note}, as my.package.Module; {arguments}"
    )


def parse(parser: ArgumentParser, args: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The options of a command, and the arguments ``--model.<name>=<value>`` (or with a space), values as YAML."""
    import yaml

    options, left = parser.parse_known_args(args)
    found: dict[str, Any] = {}
    while left:
        key, equals, value = left.pop(0).partition("=")
        if not key.startswith("--model.") or not (equals or left):
            parser.error(f"unknown argument {key}")
        if options.model is None:
            parser.error(f"{key} without --model")
        found[key.removeprefix("--model.")] = yaml.safe_load(value if equals else left.pop(0))
    return options, found


def find_module(name: str) -> type[L.LightningModule]:
    """The class called ``name``: with its package, or the last part alone where it is one of this package's tasks.

    Raises:
        StateError: there is none, or it is no LightningModule.
    """
    package, _, last = name.rpartition(".")
    tasks = importlib.import_module(_TASKS)
    try:
        found = getattr(importlib.import_module(package), last) if package else getattr(tasks, last, None)
    except (ImportError, AttributeError) as error:
        raise StateError(f"--model {name}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, lightning_classes("LightningModule")):
        raise StateError(f"--model {name} is no LightningModule; write my.package.Module, or one of {tasks.__all__}")
    return found


def build_module(name: str, arguments: Mapping[str, Any]) -> L.LightningModule:
    """A new module of the class called ``name``.

    Raises:
        StateError: there is no such class, or it cannot be built so.
    """
    try:
        module = find_module(name)(**arguments)
    except TypeError as error:
        raise StateError(f"{name} cannot be built ({error}): give --model.<argument>=<value>") from error
    module.configure_model()
    return module


def load_module(checkpoint: str | Path, name: str | None, arguments: Mapping[str, Any]) -> L.LightningModule:
    """The module of a checkpoint, with its adapters.

    Args:
        checkpoint: of a run.
        name: its class as :func:`find_module` takes it; None where the checkpoint names a task of this package. What
            else a checkpoint names is not imported.
        arguments: of the class, beside those that the checkpoint has.

    Raises:
        StateError: no class is named, or it cannot be built so.
    """
    if name is None:
        said = str(read_checkpoint(checkpoint, mmap=True).get("hyper_parameters", {}).get("_class_path", ""))
        if not said.startswith(f"{_TASKS}."):
            hint = f"; it says that it was {said}, which is not imported for a file to say so" if said else ""
            raise StateError(f"name the class that was trained, --model my.package.Module{hint}")
        name = said.rpartition(".")[2]
    module_class = find_module(name)
    try:
        return lp.load_from_checkpoint(module_class, checkpoint, **arguments)
    except TypeError as error:
        raise StateError(
            f"{name} cannot be built from the hyperparameters in the checkpoint ({error}): give what is missing as "
            "--model.<argument>=<value>, or call self.save_hyperparameters() in its __init__ before training"
        ) from error
