"""The ``lightning-peft`` command. ``--help``, ``--version``, ``methods``, ``recipes`` and ``inspect PATH`` are answered
here.

They read files of ``lightning_peft`` without importing it, because importing torch and Lightning takes seconds. This
package is separate from ``lightning_peft`` because importing any module of a package imports the package first.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

__all__ = ["COMMANDS", "answer", "main", "package"]

DESCRIPTION = "Fine-tune any LightningModule with few trainable parameters."

EXAMPLES = """examples:
  lightning-peft recipes copy quickstart
  lightning-peft fit --config recipes/quickstart.yaml --method.r=16
  lightning-peft fit --model my.Module --data my.Data --method LoRA --method.r=8

With every command, --import my.module makes the methods and tasks of that
module known.
`lightning-peft COMMAND --help` explains a command."""

#: every command and its help text
COMMANDS = {
    "fit": "Train adapters.",
    "validate": "Evaluate a checkpoint on the validation data.",
    "test": "Evaluate a checkpoint on the test data.",
    "predict": "Write the predictions of a checkpoint to a file.",
    "inspect": "Preview what a method adapts; with a PATH, describe that adapter or checkpoint.",
    "methods": "List all methods, or explain one (methods lora).",
    "recipes": "List the example configurations, or copy one (recipes copy quickstart).",
    "compare": "Train several methods under equal conditions, and recommend one.",
    "merge": "Merge trained adapters into their base, and write the plain model.",
    "export": "Write the adapters of a checkpoint as directories that Hugging Face PEFT can read.",
    "import": "Create a checkpoint from an adapter directory of this package or of Hugging Face PEFT.",
    "serve": "Answer HTTP requests with one base model and a folder of adapters.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-peft`` and ``python -m lightning_peft``."""
    given = list(sys.argv[1:] if args is None else args)
    if not answer(given):
        from lightning_peft.cli.main import main as run

        run(given)


def answer(args: Sequence[str]) -> bool:
    """Run a command that does not need Lightning; return whether ``args`` is one."""
    command, *rest = args or ["--help"]
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        print(_version())
    elif command == "recipes":
        from lightning_peft_command.recipes import recipes

        recipes(rest)
    elif command == "methods" and not any(argument.partition("=")[0] == "--import" for argument in rest):
        from lightning_peft_command.methods import methods, read_methods

        methods(rest, read_methods())
    elif command == "inspect" and rest and not rest[0].startswith("-") and "--import" not in " ".join(rest):
        from lightning_peft_command.inspect import inspect

        inspect(rest)
    else:
        return False
    return True


def package() -> Path:
    """The folder of ``lightning_peft``, which is not imported."""
    spec = importlib.util.find_spec("lightning_peft")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _help() -> str:
    indent = " " * 12
    lines = [
        textwrap.fill(text, 80, initial_indent=f"  {name:<10}", subsequent_indent=indent)
        for name, text in COMMANDS.items()
    ]
    usage = "usage: lightning-peft [--help] [--version] COMMAND ..."
    return "\n".join([usage, "", DESCRIPTION, "", "commands:", *lines, "", EXAMPLES])


def _version() -> str:
    own = re.search(r'^__version__ = "(.*)"', (package() / "__init__.py").read_text(), re.MULTILINE)
    others = [f"{name} {version}" for name in ("torch", "lightning", "transformers") if (version := _installed(name))]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"lightning_peft {own[1] if own else 'unknown'} ({', '.join([f'Python {python}', *others])})"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
