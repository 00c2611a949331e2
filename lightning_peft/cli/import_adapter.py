"""``lightning-peft import``: create a Lightning checkpoint from an adapter directory.

The checkpoint is like one of a run of this module with this adapter, saved at step 0. ``lp.load_from_checkpoint`` and
``test --ckpt_path`` read it like any other checkpoint. ``fit --ckpt_path`` continues training from it with a new
optimizer.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from lightning_peft.cli.module import add_model_option, build_module, parse
from lightning_peft.core.state.atomic_file import save_torch_file
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.checkpoint import import_checkpoint
from lightning_peft.trainer.checkpoints.manifest import KEY

__all__ = ["import_adapter"]


def import_adapter(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``import``.
    """
    parser = ArgumentParser(
        prog="lightning-peft import",
        description="Create a Lightning checkpoint from an adapter directory of this package or of Hugging Face PEFT.",
    )
    parser.add_argument("directory", help="an adapter directory")
    parser.add_argument("checkpoint", help="the file to write, such as out.ckpt")
    add_model_option(parser, "the class of the module to train or test the adapter in", required=True)
    parser.add_argument("--name", help="the adapter's name in the checkpoint; default: its saved name")
    parser.add_argument("--any-base", action="store_true", help="skip the base-model check")
    parser.add_argument(
        "--ignore-option",
        action="append",
        default=[],
        help="ignore this unknown option of adapter_config.json; repeatable",
    )
    options, arguments = parse(parser, args)
    how = {"check_base": not options.any_base, "ignore_options": options.ignore_option}
    module = build_module(options.model, arguments)
    try:
        checkpoint = import_checkpoint(module, options.directory, options.name, **how)
    except (FormatError, TargetError):
        module.setup("predict")  # some modules create their layers in setup
        checkpoint = import_checkpoint(module, options.directory, options.name, **how)
    save_torch_file(checkpoint, options.checkpoint)
    names = ", ".join(entry["config"]["name"] for entry in checkpoint[KEY]["methods"])
    print(f"{options.checkpoint}: {names}", file=sys.stderr)
