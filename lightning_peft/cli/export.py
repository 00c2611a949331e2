"""``lightning-peft export``: the adapters of a checkpoint as adapter directories, which PEFT reads as well."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import lightning_peft as lp
from lightning_peft.cli.module import add_model_option, load_module, parse
from lightning_peft.formats.checkpoint import export_checkpoint
from lightning_peft.formats.directory.files import read_files

__all__ = ["export"]


def export(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what comes after ``export``.
    """
    parser = ArgumentParser(
        prog="lightning-peft export",
        description="Write the adapters of a checkpoint as adapter directories, in Hugging Face PEFT's format where it "
        "has the method. The checkpoint alone is enough for most methods; others need the module that was trained.",
    )
    parser.add_argument("checkpoint", help="a checkpoint of a run with methods attached")
    parser.add_argument("directory", help="where to; several adapters go into folders of their names in it")
    parser.add_argument("--name", help="one adapter; by default all of them")
    parser.add_argument("--fold-scale", action="store_true", help="LoRA: multiply B by the scale, for simple readers")
    add_model_option(parser, "where the checkpoint is not enough, the class that was trained")
    options, arguments = parse(parser, args)
    extra = {"fold_scale": True} if options.fold_scale else {}
    if options.model is None:
        names = export_checkpoint(options.checkpoint, options.directory, options.name, **extra)
    else:
        module = load_module(options.checkpoint, options.model, arguments)
        names = lp.save_adapter(module, options.directory, options.name, **extra)
    print(f"{options.directory}: {', '.join(names)}", file=sys.stderr)
    for name in names:
        folder = Path(options.directory) / name if len(names) > 1 else Path(options.directory)
        if (reason := read_files(folder).config.get("reason")) is not None:
            print(f"{folder}: only this package reads it, not Hugging Face PEFT: {reason}", file=sys.stderr)
