"""``lightning-peft methods``: list all methods, or explain one."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

import lightning_peft as lp
from lightning_peft.core.names import nearest

__all__ = ["command_name", "exported", "methods"]


def command_name(method: type[lp.PEFTMethod]) -> str:
    """The name of a method on the command line: ``PrefixTuning`` is ``prefix-tuning``, ``AdaLoRA`` is ``adalora``."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z]{3})|(?<=[a-z]{4})(?=[A-Z])", "-", method.__name__).lower()


def methods(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``methods``: nothing, or a method's class or command-line name, such as
            ``LoRA`` or ``prefix-tuning``.
    """
    parser = ArgumentParser(prog="lightning-peft methods", description="List all methods, or explain one.")
    parser.add_argument("name", nargs="?", help="the method to explain, such as lora")
    name = parser.parse_args(args).name
    known = {command_name(m): m for m in exported()}
    if name is None:
        table = Table("name", "class", "description")
        for command, method in sorted(known.items()):
            table.add_row(command, method.__name__, (method.__doc__ or "").partition("\n")[0])
        Console().print(table)
        return
    found = known.get(name) or next((m for m in known.values() if m.__name__.lower() == name.lower()), None)
    if found is None:
        near = nearest(name.lower(), known, n=3, cutoff=0.4) or sorted(known)
        sys.exit(f"error: no method named {name!r}; nearest: {', '.join(near)}")
    module = sys.modules[found.__module__]
    Console().print(_plain(f"{module.__doc__}\n{inspect.getdoc(found)}"), markup=False, highlight=False)


def _plain(text: str) -> str:
    """Remove the reStructuredText markup of references and code from a docstring."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")


def exported() -> list[type[lp.PEFTMethod]]:
    """Return the method classes that the package exports."""
    found = (getattr(lp, name) for name in lp.__all__)
    return [m for m in found if isinstance(m, type) and issubclass(m, lp.PEFTMethod) and not inspect.isabstract(m)]
