"""``lightning-peft methods``: list all methods, or explain one, from the docstrings in the source files."""

from __future__ import annotations

import ast
import difflib
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_peft_command import package
from lightning_peft_command.settings import command_name, read_settings

__all__ = ["Described", "methods", "read_methods"]


class Described(NamedTuple):
    """A method class: its name, and the docstrings of the class and of its file."""

    name: str
    doc: str
    file_doc: str


def read_methods() -> list[Described]:
    """Read the methods that ``lightning_peft`` exports, without importing it."""
    exports = (package() / "__init__.py").read_text()
    found = []
    for file, names in re.findall(r"^from lightning_peft\.methods\.(\w+) import ([\w, ]+)$", exports, re.MULTILINE):
        tree = ast.parse((package() / "methods" / f"{file}.py").read_text())
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or node.name not in names.split(", "):
                continue
            if not any(isinstance(base, ast.Name) and base.id == "Callback" for base in node.bases):
                found.append(Described(node.name, ast.get_docstring(node) or "", ast.get_docstring(tree) or ""))
    return found


def methods(args: Sequence[str], known: Iterable[Described]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``methods``: nothing, or a method's class or command-line name, such as
            ``LoRA`` or ``prefix-tuning``.
        known: the methods.
    """
    from rich.console import Console
    from rich.table import Table

    parser = ArgumentParser(prog="lightning-peft methods", description="List all methods, or explain one.")
    parser.add_argument("name", nargs="?", help="the method to explain, such as lora")
    name = parser.parse_args(args).name
    by_name = {command_name(method.name): method for method in known}
    if name is None:
        table = Table("name", "class", "description")
        for command, method in sorted(by_name.items()):
            table.add_row(command, method.name, method.doc.partition("\n")[0])
        Console().print(table)
        return
    found = by_name.get(name) or next((m for m in by_name.values() if m.name.lower() == name.lower()), None)
    if found is None:
        near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4) or sorted(by_name)
        sys.exit(f"error: no method named {name!r}; nearest: {', '.join(near)}")
    console = Console()
    console.print(_plain(f"{found.file_doc}\n{found.doc}"), markup=False, highlight=False)
    settings = read_settings().get(command_name(found.name))
    if settings is not None:
        copy = f"lightning-peft recipes copy quickstart --method {command_name(found.name)}"
        console.print(f"\nExample ({copy}):\n\n{settings.text}", markup=False, highlight=False)


def _plain(text: str) -> str:
    """Remove the reStructuredText markup of references and code from a docstring."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")
