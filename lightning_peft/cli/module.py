"""Build the module that a command line names by its class: ``--model my.package.Module --model.width=16``."""

from __future__ import annotations

import importlib
import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import yaml

import lightning_peft as lp
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.trainer.checkpoints.hyperparameters import parameters_of, takes_any
from lightning_peft.trainer.checkpoints.manifest import read_checkpoint
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["add_model_option", "build_module", "find_module", "load_module", "parse"]

_TASKS = "lightning_peft.tasks"


def add_model_option(parser: ArgumentParser, note: str, required: bool = False) -> None:
    """Add ``--model`` to a command. :func:`parse` reads it and its arguments."""
    arguments = "its arguments are given as --model.width=16; classes and callables are given by their import path"
    parser.add_argument(
        "--model", metavar="CLASS", required=required, help=f"{note}, such as my.package.Module; {arguments}"
    )


def parse(parser: ArgumentParser, args: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Return the options of a command, and the model arguments ``--model.<name>=<value>`` (or with a space).

    Values have the same form as for ``fit``: plain values are YAML, classes and callables are import paths
    (``--model.act=torch.nn.GELU``, ``--model.body=my.Body --model.body.width=8``).

    Raises:
        StateError: if the class does not exist, or an argument does not fit it.
    """
    options, left = parser.parse_known_args(args)
    flags: list[str] = []
    while left:
        key, equals, value = left.pop(0).partition("=")
        if not key.startswith("--model.") or not (equals or left):
            parser.error(f"unknown argument {key}")
        if options.model is None:
            parser.error(f"{key} without --model")
        flags.append(f"{key}={value if equals else left.pop(0)}")
    return options, _arguments(options.model, flags) if flags else {}


def _arguments(name: str, flags: list[str]) -> dict[str, Any]:
    """Parse the given arguments of the class ``name``; arguments that are objects are built."""
    module_class = find_module(name)
    by_name: dict[str, list[str]] = {}
    for flag in flags:
        by_name.setdefault(flag.removeprefix("--model.").partition("=")[0].partition(".")[0], []).append(flag)
    known = parameters_of(module_class)
    unknown = {key: by_name.pop(key)[-1] for key in sorted(by_name.keys() - known.keys())}
    if unknown and not takes_any(module_class):
        raise StateError(f"{name} has no argument {', '.join(unknown)}: its arguments are {', '.join(known)}")
    rest = {key: yaml.safe_load(flag.partition("=")[2]) for key, flag in unknown.items()}
    if not by_name:
        return rest
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    # Parse only the given arguments: the others come from the checkpoint or from the class's defaults.
    skip = known.keys() - by_name.keys()
    parser.add_class_arguments(module_class, "model", skip=set(skip), instantiate=False, fail_untyped=False)  # type: ignore[arg-type]
    try:
        found = parser.parse_args([flag for flags in by_name.values() for flag in flags], defaults=False)
        return {**vars(parser.instantiate_classes(found).model), **rest}
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise StateError(f"{name} cannot be built with {' '.join(flags)}: {error}") from error


def find_module(name: str) -> type[L.LightningModule]:
    """Import the class ``name``, an import path or the name of one of this package's tasks.

    Raises:
        StateError: if the class does not exist, or it is not a LightningModule.
    """
    package, _, last = name.rpartition(".")
    tasks = importlib.import_module(_TASKS)
    try:
        found = getattr(importlib.import_module(package), last) if package else getattr(tasks, last, None)
    except (ImportError, AttributeError) as error:
        raise StateError(f"--model {name}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, lightning_classes("LightningModule")):
        raise StateError(f"--model {name} is not a LightningModule: pass my.package.Module, or one of {tasks.__all__}")
    return found


def build_module(name: str, arguments: Mapping[str, Any]) -> L.LightningModule:
    """Build a new module of the class ``name``.

    Raises:
        StateError: if the class does not exist, or it cannot be built with these arguments.
    """
    try:
        module = find_module(name)(**arguments)
    except TypeError as error:
        raise StateError(f"{name} cannot be built ({error}): pass --model.<argument>=<value>") from error
    module.configure_model()
    return module


def _task_of(checkpoint: str | Path) -> str:
    """Return the name of the task of this package that the checkpoint names.

    Raises:
        StateError: if the checkpoint does not name a class, or names one that is not a task.
    """
    hyper_parameters = read_checkpoint(checkpoint, mmap=True).get("hyper_parameters")
    said = hyper_parameters.get("_class_path") if isinstance(hyper_parameters, Mapping) else None
    package, _, name = said.rpartition(".") if isinstance(said, str) else ("", "", "")
    if f"{package}.".startswith(f"{_TASKS}.") and name in importlib.import_module(_TASKS).__all__:
        return name
    way = "add --model with the class that you trained, such as --model my.package.Module"
    if package in ("", "__main__") or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", str(said), re.ASCII):
        raise StateError(f"{checkpoint} does not name the class of the trained module: {way}")
    raise StateError(
        f"{checkpoint} names the class {said}, but class names in files are never imported, because importing runs "
        f"code: {way}. Use the name in the file only if you trust the file and that code"
    )


def load_module(checkpoint: str | Path, name: str | None, arguments: Mapping[str, Any]) -> L.LightningModule:
    """Load the module of a checkpoint, with its adapters.

    Args:
        checkpoint: the path of a run's checkpoint.
        name: the class, as for :func:`find_module`; None if the checkpoint names a task of this package. No other class
            that a checkpoint names is imported.
        arguments: arguments of the class, in addition to those in the checkpoint.

    Raises:
        StateError: if no class is named, or it cannot be built with these arguments.
    """
    if name is None:
        name = _task_of(checkpoint)
    module_class = find_module(name)
    try:
        return lp.load_from_checkpoint(module_class, checkpoint, **arguments)
    except TypeError as error:
        raise StateError(
            f"{name} cannot be built from the hyperparameters in the checkpoint ({error}): pass the missing ones as "
            "--model.<argument>=<value>, or call self.save_hyperparameters() in its __init__ before training"
        ) from error
