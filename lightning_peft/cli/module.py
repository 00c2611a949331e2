"""A module that a command names by its class: ``--model my.package.Module --model.width=16``."""

from __future__ import annotations

import importlib
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
    """Add ``--model`` to a command, and say how its arguments are given; :func:`parse` takes them."""
    arguments = "its arguments are --model.width=16 and so on, classes and callables by their import path"
    parser.add_argument(
        "--model", metavar="CLASS", required=required, help=f"{note}, as my.package.Module; {arguments}"
    )


def parse(parser: ArgumentParser, args: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The options of a command, and the arguments ``--model.<name>=<value>`` (or with a space).

    Values are as ``fit`` takes them: plain ones as YAML, classes and callables by their import path
    (``--model.act=torch.nn.GELU``, ``--model.body=my.Body --model.body.width=8``).

    Raises:
        StateError: there is no such class, or an argument does not fit it.
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
    """The given arguments of the class called ``name``, built where they are objects."""
    module_class = find_module(name)
    by_name: dict[str, list[str]] = {}
    for flag in flags:
        by_name.setdefault(flag.removeprefix("--model.").partition("=")[0].partition(".")[0], []).append(flag)
    known = parameters_of(module_class)
    unknown = {key: by_name.pop(key)[-1] for key in sorted(by_name.keys() - known.keys())}
    if unknown and not takes_any(module_class):
        raise StateError(
            f"{name} cannot be built so: it has no argument {', '.join(unknown)}; it has {', '.join(known)}"
        )
    rest = {key: yaml.safe_load(flag.partition("=")[2]) for key, flag in unknown.items()}
    if not by_name:
        return rest
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    # Only what is given: the checkpoint or the class has the rest.
    skip = known.keys() - by_name.keys()
    parser.add_class_arguments(module_class, "model", skip=set(skip), instantiate=False, fail_untyped=False)  # type: ignore[arg-type]
    try:
        found = parser.parse_args([flag for flags in by_name.values() for flag in flags], defaults=False)
        return {**vars(parser.instantiate_classes(found).model), **rest}
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise StateError(f"{name} cannot be built with {' '.join(flags)}: {error}") from error


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
        hyper_parameters = read_checkpoint(checkpoint, mmap=True).get("hyper_parameters")
        said = str(hyper_parameters.get("_class_path", "")) if isinstance(hyper_parameters, Mapping) else ""
        if not said.startswith(f"{_TASKS}.") or said.rpartition(".")[2] not in importlib.import_module(_TASKS).__all__:
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
