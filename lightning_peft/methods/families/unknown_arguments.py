"""Advice for an argument that a method does not have: the argument that was probably meant."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning_peft.core.names import nearest

__all__ = ["advice"]

#: the name of an argument in PEFT and other libraries -> its name here
_SPELLINGS = {
    **dict.fromkeys(["rank", "lora_rank", "lora_dim", "dim"], "r"),
    **dict.fromkeys(["init_lora_weights", "init_weights"], "init"),
    "adapter_name": "name",
    "exclude_modules": "exclude",
    "feedforward_modules": "feedforward_targets",
    "modules_to_save": "trainable",
    "oft_block_size": "block_size",
    "projection_prng_key": "projection_seed",
    "target_modules": "targets",
    "trainable_token_indices": "trainable_tokens",
}

#: arguments of PEFT without an equal argument here -> what to do instead
_INSTEAD = {
    "use_dora": "use lp.DoRA",
    "task_type": "leave it out, the model's class is enough",
    "inference_mode": "leave it out, lp.load_adapter loads adapters frozen",
    "fan_in_fan_out": "leave it out, the layer's class is enough",
    "layers_to_transform": r"name the layers in targets, such as 're:.*layers\.[0-3]\..*q_proj'",
    "layers_pattern": r"name the layers in targets, such as 're:.*layers\.[0-3]\..*q_proj'",
}


def advice(name: str, known: Collection[str], value: Any = ...) -> str:
    """Return what to write instead of the unknown argument ``name``.

    Args:
        name: an argument that does not exist.
        known: the arguments that do.
        value: its value, to be shown in the advice.
    """
    if name in _INSTEAD:
        return _INSTEAD[name]
    short = name.partition("_")[2]  # PEFT's lora_alpha, hira_dropout
    found = [right for right in (_SPELLINGS.get(name), short, *nearest(name, known)) if right in known]
    if not found:
        return f"its arguments are {', '.join(known)}"
    shown = repr(value)
    return f"it is called {found[0]} here" if value is ... or len(shown) > 60 else f"write {found[0]}={shown}"
