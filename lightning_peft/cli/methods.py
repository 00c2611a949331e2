"""``lightning-peft methods`` together with ``--import``, and the list of the methods that the package exports."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

import lightning_peft as lp
from lightning_peft.core.registry import registered_methods
from lightning_peft_command.methods import Described
from lightning_peft_command.methods import methods as show
from lightning_peft_command.settings import command_name as _command_name

__all__ = ["command_name", "exported", "methods"]


def command_name(method: type[lp.PEFTMethod]) -> str:
    """The name of a method on the command line: ``PrefixTuning`` is ``prefix-tuning``."""
    return _command_name(method.__name__)


def methods(args: Sequence[str]) -> None:
    """Run the command with the user's own methods in addition to those of the package.

    Args:
        args: the command-line arguments after ``methods``.
    """
    own = [
        method
        for method in registered_methods()
        if not method.__module__.startswith("lightning_peft.") and not inspect.isabstract(method)
    ]
    show(args, [_describe(method) for method in (*exported(), *own)])


def _describe(method: type[lp.PEFTMethod]) -> Described:
    file_doc = inspect.getdoc(sys.modules[method.__module__]) or ""
    return Described(method.__name__, inspect.getdoc(method) or "", file_doc)


def exported() -> list[type[lp.PEFTMethod]]:
    """Return the method classes that the package exports."""
    found = (getattr(lp, name) for name in lp.__all__)
    return [m for m in found if isinstance(m, type) and issubclass(m, lp.PEFTMethod) and not inspect.isabstract(m)]
