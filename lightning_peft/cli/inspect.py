"""``lightning-peft inspect PATH``: describe an adapter directory or a checkpoint, without a model."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from rich.console import Console

from lightning_peft.formats.describe import describe

__all__ = ["inspect_path", "names_a_path"]


def names_a_path(args: Sequence[str]) -> bool:
    """True if the arguments after ``inspect`` start with a path instead of an option."""
    return len(args) > 0 and not args[0].startswith("-")


def inspect_path(args: Sequence[str]) -> None:
    """Print the description of an adapter directory or a checkpoint."""
    parser = ArgumentParser(prog="lightning-peft inspect", description="Describe an adapter or a checkpoint.")
    parser.add_argument("path", help="an adapter directory of this package or of Hugging Face PEFT, or a .ckpt file")
    Console().print(describe(parser.parse_args(args).path))
