"""The converters, one for each of PEFT's kinds that this package has."""

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


#: what PEFT has alone and this package only beside something else
_INSTEAD = {
    "TRAINABLE_TOKENS": "here rows of embeddings train with LoRA, and no method trains them alone; in PEFT that is "
    "LoraConfig(trainable_token_indices=...) with targets, which is read"
}


def converter_for_type(peft_type: str) -> Converter:
    """The converter that reads ``peft_type``.

    Raises:
        FormatError: there is none.
    """
    known = {converter.peft_type: converter for converter in CONVERTERS}
    if peft_type not in known:
        if peft_type in _INSTEAD:
            raise FormatError(f"peft_type {peft_type!r} cannot be read: {_INSTEAD[peft_type]}")
        near = nearest(str(peft_type).upper(), known, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise FormatError(f"peft_type {peft_type!r} is none that can be read; known are {sorted(known)}{hint}")
    return known[peft_type]


def converter_for_method(method: PEFTMethod) -> Converter | None:
    """The converter that writes ``method``; None where PEFT has nothing like it."""
    return next((converter for converter in CONVERTERS if type(method) in converter.methods), None)
