"""The list of converters, one for each ``peft_type`` that this package supports."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.native import NativeConverter
from lightning_peft.formats.peft import families
from lightning_peft.formats.peft.converter import Converter
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["CONVERTERS", "converter_for_method", "converter_for_type"]


def _converters() -> Iterator[Converter]:
    """One of each class in the modules of ``families``, so that a new file there needs no other edit."""
    for info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Converter) and "peft_type" in vars(value):
                yield value()


CONVERTERS: tuple[Converter, ...] = (*_converters(), NativeConverter())


#: PEFT types that are only an option of another method in this package
_INSTEAD = {
    "TRAINABLE_TOKENS": "this package trains single embedding vectors only together with LoRA. Train it with "
    "LoraConfig(trainable_token_indices=..., target_modules=...), which can be loaded"
}


def converter_for_type(peft_type: str) -> Converter:
    """The converter that reads ``peft_type``.

    Raises:
        FormatError: if the type is not supported.
    """
    known = {converter.peft_type: converter for converter in CONVERTERS}
    if peft_type not in known:
        if peft_type in _INSTEAD:
            raise FormatError(f"peft_type {peft_type!r} is not supported: {_INSTEAD[peft_type]}")
        # Without the nearest name: HRA and HiRA are different methods, not two spellings of one.
        raise FormatError(f"peft_type {peft_type!r} is not supported; supported are {sorted(known)}")
    return known[peft_type]


def converter_for_method(method: PEFTMethod) -> Converter | None:
    """The converter that writes ``method``; None if PEFT has no such method."""
    return next((converter for converter in CONVERTERS if type(method) in converter.methods), None)
