"""Module names that transformers renamed: read files with old names, and refuse targets that PEFT would rename."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import leaf
from lightning_peft.core.optional import config_value
from lightning_peft.core.targeting.base_model import Base, depth_of
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.peft.converter import PREFIX, NotInPeftError

__all__ = ["check_not_renamed", "in_current_layout"]

#: model type -> target names that PEFT renames when it loads LoRA, because older releases had one module per expert
#: and newer ones stack the experts' weights
_STACKED = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def in_current_layout(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's options and tensors with the module names of the installed transformers release.

    For example, LLaVA's ``language_model.model.layers`` became ``model.language_model.layers``. The changes come from
    transformers' own table. A name is changed only if a longer part of the new name exists in the base.

    Raises:
        FormatError: if the file has tensors of single experts, but the base stacks its experts.
    """
    _check_experts(tensors, base)
    rename = _renaming(base)
    if rename is None:
        return dict(config), dict(tensors)

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [rename(name) if isinstance(name, str) else name for name in value]
        return {rename(name): v for name, v in value.items()} if isinstance(value, dict) else value

    named = ("target_modules", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")
    options = {option: renamed(value) if option in named else value for option, value in config.items()}
    keys = {key: PREFIX + rename(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else key for key in tensors}
    return options, {keys[key]: value for key, value in tensors.items()}


def _check_experts(tensors: Iterable[str], base: Base) -> None:
    single = re.compile(r"(^|\.)experts\.\d+(\.|$)")
    key = next(filter(single.search, tensors), None)
    if key is None or any(single.search(name) for name in base.modules()):
        return
    raise FormatError(
        f"{key} belongs to a single expert, which was a module in transformers before release 5; "
        f"{original_class(base.module).__name__} stacks the experts' weights in one parameter. Convert the file with "
        "peft: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder), and load the new folder"
    )


def _renaming(base: Base) -> Callable[[str], str] | None:
    """Return a function that maps an old module name to the present one; None if no names of this base changed."""
    table: Any = getattr(sys.modules.get("transformers.conversion_mapping"), "get_model_conversion_mapping", None)
    if table is None or not base.facts()["pretrained"]:
        return None
    changes = [change for change in table(base.module) or () if not hasattr(change, "operations")]

    def rename(name: str) -> str:
        new = name
        for change in changes:
            new = change.rename_source_key(new)[0]
        return new if depth_of(base.module, new.split(".")) > depth_of(base.module, name.split(".")) else name

    return rename if changes else None


def check_not_renamed(targets: list[str] | str, base: Base) -> None:
    """Refuse targets that PEFT would rename, because it treats them as experts of an older transformers release.

    In a model with stacked experts (Mixtral, Qwen-MoE, DeepSeek-V3, ...), PEFT treats every ``gate_proj``, ``up_proj``
    and ``down_proj`` as an expert, including those of dense layers and shared experts.

    Raises:
        NotInPeftError: if a target would be renamed; the message names it.
    """
    kinds: Any = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    model_type = config_value(getattr(base.module, "config", None), "model_type")
    leaves = _STACKED.get({**kinds, "mixtral": "mixtral"}.get(model_type, ""), ())
    names: Iterable[str] = re.split(r"\|", targets.replace("\\", "")) if isinstance(targets, str) else targets
    for name in names:
        if leaves and (isinstance(targets, str) or leaf(name) in leaves):
            raise NotInPeftError(
                f"PEFT treats {name!r} of a {model_type} as an expert of an older transformers release, and would "
                "adapt the stacked experts instead"
            )
