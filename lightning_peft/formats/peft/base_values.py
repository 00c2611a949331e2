"""Read and write values of the base's own parameters and buffers that an adapter trained: heads, biases, statistics.

PEFT writes them under their own names, and those of an adapted module one level down: ``<module>.base_layer.bias``.
When it loads a file, it loads every key of the base that it finds, so all trained values of the base can be written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import is_within, leaf, owner_of
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.base_modules import base_state_dict
from lightning_peft.core.targeting.biases import is_bias_name
from lightning_peft.core.targeting.ties import under_all_names, with_tied
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, NotInPeftError, Options, Tensors
from lightning_peft.formats.peft.targets import heads_of

__all__ = ["bias_option", "modules_to_save", "take_base_values", "write_base_values"]

#: heads that PEFT adds to modules_to_save for a task, whether or not the model has them
_PEFT_HEADS = ("classifier", "score", "qa_outputs")


def modules_to_save(snapshot: Snapshot) -> list[str] | None:
    """``modules_to_save`` entries that PEFT matches to exactly the heads of ``snapshot``; None if it has no heads.

    Raises:
        NotInPeftError: if the whole model trains.
    """
    if "" in snapshot.heads:
        raise NotInPeftError("the whole model trains, and PEFT cannot save a whole model as an adapter")
    found = []
    others = snapshot.base.modules().keys() - set(snapshot.heads)
    for head in snapshot.heads:
        # PEFT matches with str.endswith ("score" matches "underscore"), and excludes targets whose names contain the
        # name of a head. The full name with PEFT's prefix avoids both.
        outside = [other for other in others if not is_within(other, head)]
        clash = any(other.endswith(head) or re.match(rf"(^|.*\.){head}($|\..*)", other) for other in outside)
        found.append(PREFIX + head if clash else head)
    return found or None


def bias_option(snapshot: Snapshot, targets: Iterable[str]) -> str:
    """PEFT's ``bias`` option: ``"none"``, ``"lora_only"`` if only adapted modules' biases train, else ``"all"``."""
    biases = [name for name in snapshot.trained if is_bias_name(name)]
    owners = {owner_of(name) for name in biases if not is_within(name, *snapshot.heads)}
    targets = set(targets)
    of_targets = targets | {f"{name}.out_proj" for name in targets}
    return "none" if not owners else "lora_only" if owners <= of_targets else "all"


def write_base_values(snapshot: Snapshot, targets: Iterable[str], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Return the values of the base that a method trained, under PEFT's keys.

    Args:
        snapshot: The snapshot of the method.
        targets: The modules that PEFT wraps for its adapters.
        prefix: The prefix of every key.
    """
    modules = snapshot.base.module
    wrapped = set(targets)
    attention = {f"{name}.out_proj" for name in wrapped if _is_attention(modules, name)}
    found = {}
    for name, value in snapshot.trained.items():
        parts = name.split(".")
        for i in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:i]) in wrapped | attention:
                parts.insert(i, "base_layer")
        found[prefix + ".".join(parts)] = value
    return found


def _is_attention(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name), nn.MultiheadAttention)


def take_base_values(
    options: Options, tensors: Tensors, base: Base, prefix: str = PREFIX, tie: bool = False
) -> tuple[list[str], dict[str, Tensor]]:
    """Take from a file the heads, and all values of base parameters that differ from those in the base.

    Args:
        options: The file's options.
        tensors: The file's tensors.
        base: The base that they belong to.
        prefix: The prefix of every key.
        tie: Whether the file has a tied value under one of its names only, as older releases wrote it.

    Returns:
        The names of the heads, and values by name in the base.

    Raises:
        FormatError: if a head is incomplete, or the vocabulary size of an embedding differs from that of the base.
    """
    modules = base.modules()
    state = {key: value for key, value in base_state_dict(base.module).items() if owner_of(key) in modules}
    heads = [h for h in options.get("modules_to_save") or [] if h not in _PEFT_HEADS or h in _ends(base)]
    names = heads_of(heads, base)
    wanted = [key for key in state if is_within(key, *names)]
    values = {key: tensors.take(key, prefix=prefix) for key in wanted}
    for key in tensors.keys():  # noqa: SIM118
        name = ".".join(part for part in key.removeprefix(prefix).split(".") if part != "base_layer")
        if key.startswith(prefix) and name in state and name not in values:
            # PEFT also writes values that did not train. Those that equal the base's need no override.
            value = tensors.take(key.removeprefix(prefix), prefix=prefix)
            if value.shape != state[name].shape or not torch.equal(value, state[name].to(value)):
                values[name] = value
    if tie:
        names, values = [*with_tied(base.module, names, ())[0]], under_all_names(base.module, values)
    _check_vocabulary(values, base)
    return names, values


def _ends(base: Base) -> set[str]:
    return {leaf(name) for name in base.modules()}


def _check_vocabulary(values: dict[str, Tensor], base: Base) -> None:
    """Refuse an embedding whose vocabulary size differs from that of the base.

    Raises:
        FormatError: if the sizes differ; the message names the size to resize to.
    """
    for name, value in values.items():
        owner: Any = base.module.get_submodule(owner_of(name))
        if isinstance(owner, nn.Embedding) and len(value) != len(owner.weight):
            raise FormatError(
                f"{name!r} has {len(value)} entries in the file but {len(owner.weight)} in the base: the vocabulary "
                f"was resized before training. Call model.resize_token_embeddings({len(value)}) first"
            )
