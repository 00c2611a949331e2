"""Support both of Lightning's packages: ``lightning`` and ``pytorch_lightning`` are copies of one code base.

Their classes are different objects, so ``isinstance`` with a class of one is False for objects of the other. A run may
use either package, but not both.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["check_packages", "lightning_classes"]

#: module prefix of a class -> the package that it belongs to
_PACKAGES = {
    "lightning.pytorch": "lightning",
    "lightning.fabric": "lightning",
    "pytorch_lightning": "pytorch_lightning",
    "lightning_fabric": "pytorch_lightning",
}


def lightning_classes(path: str) -> tuple[Any, ...]:
    """The class at ``path`` (``"callbacks.WeightAveraging"``) in each imported package, for use with ``isinstance``.

    Packages whose release does not have the class are skipped.
    """
    module, _, name = path.rpartition(".")
    found = []
    for root in ("lightning.pytorch", "pytorch_lightning"):
        if root in sys.modules:
            found.append(getattr(importlib.import_module(f"{root}.{module}".rstrip(".")), name, None))
    return tuple(cls for cls in found if cls is not None)


def check_packages(trainer: Any, module: Any) -> None:
    """Refuse a run that mixes objects of both packages.

    Raises:
        MisconfigurationException: if an object does not belong to the Trainer's package; the message names it.
    """
    package = _package(trainer)
    strange = [
        f"{what} {type(obj).__name__}" for what, obj in _parts(trainer, module) if _package(obj) not in {None, package}
    ]
    if strange:
        other = "lightning" if package == "pytorch_lightning" else "pytorch_lightning"
        raise MisconfigurationException(
            f"the Trainer is {package}'s, but these are {other}'s: {', '.join(strange)}. The two packages do not "
            f"recognise each other's classes, so parts of the run would be ignored: import them from {package}"
        )


def _parts(trainer: Any, module: Any) -> Iterator[tuple[str, Any]]:
    yield "the module", module
    # Methods and their Lifecycle only use callback hooks, so they run in a Trainer of either package.
    yield from (
        ("the callback", c)
        for c in trainer.callbacks
        if not type(c).__module__.startswith("lightning_peft.") and not hasattr(c, "plan")
    )
    yield from (("the logger", logger) for logger in trainer.loggers)
    yield "the strategy", trainer.strategy
    yield "the accelerator", trainer.accelerator
    yield "the plugin", trainer.precision_plugin
    yield "the datamodule", getattr(trainer, "datamodule", None)


def _package(obj: Any) -> str | None:
    for cls in type(obj).__mro__:
        for root, package in _PACKAGES.items():
            if f"{cls.__module__}.".startswith(f"{root}."):
                return package
    return None
