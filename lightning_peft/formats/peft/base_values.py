"""Values of the base's own parameters and buffers that travel with an adapter: heads, biases, statistics.

PEFT writes them under their plain names, those of an adapted module one level down: ``<module>.base_layer.bias``.
It loads whatever of the base it finds in a file, so all that a method trains of the base can be said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import is_within, leaf, owner_of
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.ties import under_all_names, with_tied
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, NotInPeftError, Options, Tensors
from lightning_peft.formats.peft.targets import heads_of

__all__ = ["bias_option", "modules_to_save", "take_base_values", "write_base_values"]

#: heads that PEFT names by itself for a task, whether or not the model has them
_PEFT_HEADS = ("classifier", "score", "qa_outputs")


def modules_to_save(snapshot: Snapshot) -> list[str] | None:
    """``modules_to_save`` by which PEFT finds exactly the heads of ``snapshot``.

    Raises:
        NotInPeftError: the whole model trains.
    """
    if "" in snapshot.heads:
        raise NotInPeftError("the whole model trains, of which PEFT makes no adapter")
    found = []
    others = snapshot.base.modules().keys() - set(snapshot.heads)
    for head in snapshot.heads:
        # PEFT compares the ends of names, letters and all, and takes targets for heads in which it finds their names.
        outside = [other for other in others if not is_within(other, head)]
        clash = any(other.endswith(head) or re.match(rf"(^|.*\.){head}($|\..*)", other) for other in outside)
        found.append(PREFIX + head if clash else head)
    return found or None


def bias_option(snapshot: Snapshot, targets: Iterable[str]) -> str:
    """``bias`` as PEFT says it: ``"none"``, ``"lora_only"`` of the adapted modules, or ``"all"``."""
    biases = [name for name in snapshot.trained if name.endswith("bias")]
    owners = {owner_of(name) for name in biases if not is_within(name, *snapshot.heads)}
    targets = set(targets)
    of_targets = targets | {f"{name}.out_proj" for name in targets}
    return "none" if not owners else "lora_only" if owners <= of_targets else "all"


def write_base_values(snapshot: Snapshot, targets: Iterable[str], prefix: str = PREFIX) -> dict[str, Tensor]:
    """What a method trains of the base itself, by PEFT's keys.

    Args:
        snapshot: of the method.
        targets: the modules that PEFT wraps for its adapters.
        prefix: what every key starts with.
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
    """The heads of a file, and all that it holds of the base's own values and that differs from them.

    Args:
        options, tensors: the file's.
        base: where to put them.
        prefix: what every key starts with.
        tie: whether a tied value has one of its names in the file, and is meant for all of them.

    Returns:
        The names of the heads, and values by name in the base.

    Raises:
        FormatError: a head is incomplete.
    """
    modules = base.modules()
    state = {key: value for key, value in base.module.state_dict().items() if owner_of(key) in modules}
    heads = [h for h in options.get("modules_to_save") or [] if h not in _PEFT_HEADS or h in _ends(base)]
    names = heads_of(heads, base)
    wanted = [key for key in state if is_within(key, *names)]
    values = {key: tensors.take(key, prefix=prefix) for key in wanted}
    for key in tensors.keys():  # noqa: SIM118
        name = ".".join(part for part in key.removeprefix(prefix).split(".") if part != "base_layer")
        if key.startswith(prefix) and name in state and name not in values:
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
    """Refuse an embedding of another vocabulary than the base's.

    Raises:
        FormatError: names the size to give it.
    """
    for name, value in values.items():
        owner: Any = base.module.get_submodule(owner_of(name))
        if isinstance(owner, nn.Embedding) and len(value) != len(owner.weight):
            raise FormatError(
                f"{name!r} has {len(value)} rows and the base {len(owner.weight)}: the vocabulary was resized before "
                f"training; call model.resize_token_embeddings({len(value)}) first"
            )
