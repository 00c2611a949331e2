"""Change what transformers records about a quantised model when layers of it become plain ones, and restore it.

``save_pretrained`` writes the quantisation to config.json, and ``from_pretrained`` of that directory would treat plain
weights as quantised.
"""

from __future__ import annotations

import warnings

from torch import nn

from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.packed import is_packed

__all__ = ["drop_marks", "restore_marks"]

#: the lists of a quantisation config that name the layers that are not quantised
_PLAIN_LAYERS = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")


def drop_marks(model: nn.Module) -> None:
    """Remove the marks of quantisation from the models of transformers in ``model`` that have no quantised layer left.

    If some layers are still quantised, the configuration lists the plain ones as layers that are not quantised.
    """
    for _, module in base_modules(model):
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is None:
            continue
        config, method = module.config, quantizer.quantization_config
        owners: tuple[object, ...] = (module, config, method)
        before = [dict(vars(owner)) for owner in owners]
        linear = {name: m for name, m in base_modules(module) if isinstance(m, nn.Linear) or is_packed(m)}
        plain = [name for name, layer in linear.items() if not is_packed(layer)]
        if len(plain) == len(linear):
            for mark in ("hf_quantizer", "quantization_method", "_weight_conversions"):
                vars(module).pop(mark, None)
            vars(config).pop("quantization_config", None)
            module.is_quantized = False  # type: ignore[assignment]
        elif lists := [name for name in _PLAIN_LAYERS if hasattr(method, name)]:
            for name in lists:
                setattr(method, name, sorted({*(getattr(method, name) or ()), *plain}))
        else:
            left = len(linear) - len(plain)
            warnings.warn(
                f"{left} layers of {type(module).__name__} stay quantised, and {type(method).__name__} has no list of "
                "plain layers, so from_pretrained cannot load what save_pretrained writes: adapt all "
                "quantised layers, or save with lp.save_adapter before the merge",
                stacklevel=4,
            )
        changes = [
            (owner, {k: v for k, v in old.items() if k not in vars(owner) or vars(owner)[k] is not v})
            for owner, old in zip(owners, before, strict=True)
        ]
        vars(module).setdefault("_peft_quantizer_marks", changes)


def restore_marks(model: nn.Module) -> None:
    """Undo :func:`drop_marks`."""
    for _, module in base_modules(model):
        for owner, values in vars(module).pop("_peft_quantizer_marks", ()):
            vars(owner).update(values)
