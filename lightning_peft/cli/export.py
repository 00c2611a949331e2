"""``lightning-peft export``: write the adapters of a checkpoint as adapter directories, which PEFT also reads."""

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
        args: the command-line arguments after ``export``.
    """
    parser = ArgumentParser(
        prog="lightning-peft export",
        description="Write the adapters of a checkpoint as adapter directories, in Hugging Face PEFT's format if "
        "PEFT has the method. Most methods need only the checkpoint; others also need the trained class (--model).",
    )
    parser.add_argument("checkpoint", help="the checkpoint of a run that used methods of this package")
    parser.add_argument(
        "directory", help="the output folder; several adapters are written to subfolders with their names"
    )
    parser.add_argument("--name", help="export only this adapter; default: all adapters")
    parser.add_argument(
        "--fold-scale", action="store_true", help="LoRA: bake the scale into B, for tools that ignore alpha"
    )
    add_model_option(parser, "the class of the trained module, if the checkpoint is not enough")
    options, arguments = parse(parser, args)
    if options.model is None:
        names = export_checkpoint(options.checkpoint, options.directory, options.name, fold_scale=options.fold_scale)
    else:
        module = load_module(options.checkpoint, options.model, arguments)
        names = lp.save_adapter(module, options.directory, options.name, fold_scale=options.fold_scale)
    print(f"{options.directory}: {', '.join(names)}", file=sys.stderr)
    for name in names:
        folder = Path(options.directory) / name if len(names) > 1 else Path(options.directory)
        if (reason := read_files(folder).config.get("reason")) is not None:
            print(f"{folder}: only this package can read it, Hugging Face PEFT cannot: {reason}", file=sys.stderr)
