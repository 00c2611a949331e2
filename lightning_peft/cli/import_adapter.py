"""``lightning-peft import``: an adapter directory as a Lightning checkpoint.

The checkpoint is what a run would have saved that trained this adapter in this module and has made no step since:
``lp.load_from_checkpoint`` and ``test --ckpt_path`` take it as any other, and ``fit --ckpt_path`` trains on from it
with a new optimizer.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_peft.cli.module import add_model_option, build_module, parse
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.checkpoint import import_checkpoint
from lightning_peft.trainer.checkpoints.manifest import KEY

__all__ = ["import_adapter"]


def import_adapter(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what comes after ``import``.
    """
    parser = ArgumentParser(
        prog="lightning-peft import",
        description="Make a Lightning checkpoint of an adapter directory, this package's or Hugging Face PEFT's.",
    )
    parser.add_argument("directory", help="an adapter directory")
    parser.add_argument("checkpoint", help="the file to write, such as out.ckpt")
    add_model_option(parser, "the class to train or test it in", required=True)
    parser.add_argument("--name", help="what to call the adapter; by default what it was called")
    parser.add_argument("--any-base", action="store_true", help="also where it was trained on another base")
    parser.add_argument(
        "--ignore-option", action="append", default=[], help="an unknown option of adapter_config.json to leave out"
    )
    options, arguments = parse(parser, args)
    how = {"check_base": not options.any_base, "ignore_options": options.ignore_option}
    module = build_module(options.model, arguments)
    try:
        checkpoint = import_checkpoint(module, options.directory, options.name, **how)
    except (FormatError, TargetError):
        module.setup("predict")  # a module may build its layers only here
        checkpoint = import_checkpoint(module, options.directory, options.name, **how)
    Path(options.checkpoint).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, options.checkpoint)
    names = ", ".join(entry["config"]["name"] for entry in checkpoint[KEY]["methods"])
    print(f"{options.checkpoint}: {names}", file=sys.stderr)
