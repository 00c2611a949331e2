"""``lightning-peft inspect PATH``: what an adapter directory or a checkpoint holds, without a model."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from rich.console import Console

from lightning_peft.formats.describe import describe

__all__ = ["inspect_path", "names_a_path"]


def names_a_path(args: Sequence[str]) -> bool:
    """Whether the arguments after ``inspect`` are a path, and not the options of a model."""
    return len(args) > 0 and not args[0].startswith("-")


def inspect_path(args: Sequence[str]) -> None:
    """Print what is at a path."""
    parser = ArgumentParser(prog="lightning-peft inspect", description="Say what an adapter or a checkpoint holds.")
    parser.add_argument("path", help="an adapter directory, of this package or of Hugging Face PEFT, or a .ckpt file")
    Console().print(describe(parser.parse_args(args).path))
