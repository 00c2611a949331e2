"""Convert norm tuning to and from PEFT's ``peft_type`` LN_TUNING, with keys ``<norm>.ln_tuning_layers.<parameter>``.

PEFT trains a copy of each layer, so the file has all parameters and buffers of the layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.core.names import is_adapter_key, is_within, owner_of
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, Converter, NotInPeftError, Options, Reading, Tensors, Writing
from lightning_peft.formats.peft.targets import resolve, target_modules
from lightning_peft.methods.norm_tuning import NormTuning, is_norm

__all__ = ["NormTuningConverter"]


class NormTuningConverter(Converter):
    """``peft_type`` LN_TUNING."""

    peft_type = "LN_TUNING"
    methods = (NormTuning,)

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        inner = map(snapshot.base.inner, snapshot.method.trainable_modules(snapshot.base.root))
        heads = [head for head in inner if head is not None]
        owners = dict.fromkeys(owner_of(name) for name in snapshot.trained)
        norms = [
            owner
            for owner in owners
            if is_norm(snapshot.base.module.get_submodule(owner)) and not is_within(owner, *heads)
        ]
        if not norms:
            raise NotInPeftError("PEFT's LN_TUNING needs a norm layer that trains, and this adapter has none")
        tensors: dict[str, Tensor] = {}
        for norm in norms:
            module = snapshot.base.module.get_submodule(norm)
            state = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for key, value in state.items():
                # Removed from ``trained``, whose values are also written under the base's own names.
                trained = snapshot.trained.pop(f"{norm}.{key}", None)
                tensors[f"{PREFIX}{norm}.ln_tuning_layers.{key}"] = snapshot.take(value) if trained is None else trained
        snapshot.heads = [head for head in snapshot.heads if head not in norms]
        return Writing({"target_modules": target_modules(norms, snapshot.base)}, tensors)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        own: dict[str, Tensor] = {}
        norms = resolve(options, base)
        for norm in norms:
            module = base.module.get_submodule(norm)
            if not is_norm(module):
                raise FormatError(f"target_modules: {norm!r} ({type(module).__name__}) is not a norm layer")
            for key, value in module.state_dict().items():
                if not is_adapter_key(key) and (
                    key in module._parameters or tensors.has(f"{norm}.ln_tuning_layers.{key}")
                ):
                    own[f"{norm}.{key}"] = tensors.take(f"{norm}.ln_tuning_layers.{key}", tuple(value.shape))
        return Reading(NormTuning(targets=base.patterns(norms), name=name, **common), {}, own)
