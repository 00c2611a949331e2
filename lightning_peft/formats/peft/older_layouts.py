"""Names that transformers has changed: files that were made before, and targets that PEFT takes for such."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.names import leaf
from lightning_peft.core.optional import config_value
from lightning_peft.core.targeting.base_model import Base, depth_of
from lightning_peft.formats.peft.converter import PREFIX, NotInPeftError

__all__ = ["check_not_renamed", "in_current_layout"]

#: the kinds of experts whose targets PEFT renames as it loads LoRA, as they were called one by one and now are stacked
_STACKED = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def in_current_layout(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's options and tensors by the names that the base's modules have in this release of transformers.

    LLaVA's ``language_model.model.layers`` became ``model.language_model.layers``, for example. The library's own
    table says so. A name is changed only if more of the new one is found in the base.
    """
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


def _renaming(base: Base) -> Callable[[str], str] | None:
    """A function that changes an older name of the base's; None where no name has changed."""
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
    """Refuse targets that PEFT takes for experts of an older release.

    Of a model with stacked experts (Mixtral, Qwen-MoE, DeepSeek-V3, ...) it takes every ``gate_proj``, ``up_proj`` and
    ``down_proj`` for an expert's, also those of dense layers and of shared experts.

    Raises:
        NotInPeftError: names the target.
    """
    kinds: Any = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    model_type = config_value(getattr(base.module, "config", None), "model_type")
    leaves = _STACKED.get({**kinds, "mixtral": "mixtral"}.get(model_type, ""), ())
    names: Iterable[str] = re.split(r"\|", targets.replace("\\", "")) if isinstance(targets, str) else targets
    for name in names:
        if leaves and (isinstance(targets, str) or leaf(name) in leaves):
            raise NotInPeftError(
                f"PEFT takes {name!r} of a {model_type} for an expert of an older release of transformers, and would "
                "adapt the stacked experts in its place"
            )
