"""The list of converters, one for each ``peft_type`` that this package supports."""

from __future__ import annotations

from lightning_peft.core.names import nearest
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.native import NativeConverter
from lightning_peft.formats.peft.converter import Converter
from lightning_peft.formats.peft.families.adalora import AdaLoRAConverter
from lightning_peft.formats.peft.families.ia3 import IA3Converter
from lightning_peft.formats.peft.families.lora import LoRAConverter
from lightning_peft.formats.peft.families.norm_tuning import NormTuningConverter
from lightning_peft.formats.peft.families.sequence import PrefixTuningConverter, PromptTuningConverter, PTuningConverter
from lightning_peft.formats.peft.families.vera_loha_lokr_oft import (
    LoHaConverter,
    LoKrConverter,
    OFTConverter,
    VeRAConverter,
)
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["CONVERTERS", "converter_for_method", "converter_for_type"]

CONVERTERS: tuple[Converter, ...] = (
    LoRAConverter(),
    AdaLoRAConverter(),
    VeRAConverter(),
    LoHaConverter(),
    LoKrConverter(),
    OFTConverter(),
    IA3Converter(),
    PromptTuningConverter(),
    PTuningConverter(),
    PrefixTuningConverter(),
    NormTuningConverter(),
    NativeConverter(),
)


#: types that PEFT has as a method and this package only as a part of another method
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
        near = nearest(str(peft_type).upper(), known, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise FormatError(f"peft_type {peft_type!r} is not supported; supported are {sorted(known)}{hint}")
    return known[peft_type]


def converter_for_method(method: PEFTMethod) -> Converter | None:
    """The converter that writes ``method``; None if PEFT has no such method."""
    return next((converter for converter in CONVERTERS if type(method) in converter.methods), None)
