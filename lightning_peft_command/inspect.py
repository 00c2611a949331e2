"""``lightning-peft inspect PATH``: describe an adapter directory or a checkpoint, without a model."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from lightning_peft_command import package

__all__ = ["inspect"]


def inspect(args: Sequence[str]) -> None:
    """Print the description of an adapter directory or a checkpoint.

    Args:
        args: the command-line arguments after ``inspect``, which start with a path.
    """
    parser = ArgumentParser(prog="lightning-peft inspect", description="Describe an adapter or a checkpoint.")
    parser.add_argument("path", help="an adapter directory of this package or of Hugging Face PEFT, or a .ckpt file")
    path = parser.parse_args(args).path
    with _without_lightning():
        from rich.console import Console

        from lightning_peft.core.state.state_dict import StateError
        from lightning_peft.core.untrusted import FormatError
        from lightning_peft.formats.describe import describe

        try:
            Console().print(describe(path))
        except (StateError, FormatError, OSError) as error:
            sys.exit(f"error: {error}")


@contextmanager
def _without_lightning() -> Iterator[None]:
    """Import modules of ``lightning_peft`` without its ``__init__``, which imports every method and Lightning.

    The imported modules are forgotten at the end, so that a later ``import lightning_peft`` is complete.
    """
    if "lightning_peft" in sys.modules:
        yield
        return
    module = ModuleType("lightning_peft")
    module.__path__ = [str(package())]
    sys.modules["lightning_peft"] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_peft"]:
            del sys.modules[name]
