"""The parser of fit, validate, test, predict and inspect: short errors that say what to write instead."""

from __future__ import annotations

import re
import sys
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.cli.flags import in_flags
from lightning_peft.cli.methods import exported
from lightning_peft.core.names import nearest
from lightning_peft.methods.families.unknown_arguments import advice
from lightning_peft.trainer.checkpoints.hyperparameters import parameters_of

__all__ = ["Parser"]


class Parser(LightningArgumentParser):
    """A parser that lets :class:`~lightning_peft.cli.main.PEFTCLI` report a missing class.

    Its errors about methods have one line; other errors about classes say where modules are looked up.
    """

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, not subclass_mode)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing, because the usage of a command has 90 lines and would hide the error below it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if "No module named" in message:
            message += (
                "\nModules are looked up in the folder where the command is started, and on PYTHONPATH: start it from "
                "the folder that has the module, or set PYTHONPATH"
            )
        return super().error(_in_a_line(message) or _reason(message), ex)


def _reason(message: str) -> str:
    """Shorten jsonargparse's list of one error for each type that it tried to the error that says most."""
    start, found, rest = message.partition("\n  Errors:\n")
    errors, after, hints = rest.partition("\n  Given value type:")
    if not found or not after:
        return message
    reasons = [" ".join(part.split()) for part in errors.removeprefix("    - ").split("\n    - ")]
    of_class = [reason for reason in reasons if reason.startswith("Problem with")][:1]
    _, where, advised = hints.partition("\nModules are looked up")
    return f"{start.partition(chr(10))[0]} {'; '.join(of_class or dict.fromkeys(reasons))}{where}{advised}"


def _in_a_line(message: str) -> str | None:
    """The line that replaces a message about a method, or about an argument that a class does not have."""
    known = {method.__name__: method for method in exported()}
    refused = re.search(r"class_path '([\w.]*?)(\w+)':\s+Option '(\w+)' is not accepted", message)
    if refused:
        package, class_name, option = refused.groups()
        found = getattr(sys.modules.get(package.rstrip(".")), class_name, None)
        if found is not None:
            return f"{class_name} does not have an argument {option!r}: {_advice(option, found)}"
    if "PEFTMethod is abstract" in message:
        argument = re.search(r"NestedArg\(key='(\w+)'", message)
        given = f"--method.{argument[1]}" if argument else "an argument of a method"
        return f"{given} is given, but no method: add --method LoRA, or another one of `lightning-peft methods`"
    unknown = re.search(r'key "method".*Expected a dot import path string: ([\w-]+)\n', message, re.DOTALL)
    if unknown:
        near = [name for name in known if name.lower() == unknown[1].replace("-", "").lower()]
        near = near or nearest(unknown[1], known, n=3, cutoff=0.4) or sorted(known)
        return (
            f"no method is called {unknown[1]!r}; nearest: {', '.join(near)}. `lightning-peft methods` lists all; a "
            "method of your own is given by its path, such as my.module.MyMethod"
        )
    return None


def _advice(option: str, owner: type) -> str:
    """What to write instead, in the form of the command line."""
    return in_flags(advice(option, list(parameters_of(owner))))
