"""Find weights by their role in a sub-layer, for the targets ``"all-key-value"`` and ``"all-feedforward"``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_peft.core.names import is_within
from lightning_peft.core.targeting.blocks import Sublayer, find_sublayers, label
from lightning_peft.core.targeting.frozen_parts import why_frozen
from lightning_peft.core.targeting.patterns import TargetError

__all__ = ["sublayer_weights"]

_KEY_VALUE = re.compile(r"(to_)?[kv](_proj|_lin)?|(key|value)(_proj|_layer)?|kv(_proj)?|[kv]_proj_weight|kv_b_proj")
_FUSED = re.compile(r"c_attn|w?qkv(_proj)?|query_key_value|w_pack|in_proj(_weight)?")
_ROLES = {
    "all-key-value": "the key and value projections of an attention",
    "all-feedforward": "a feed-forward block",
}


def sublayer_weights(model: nn.Module, word: str, argument: str, heads: Iterable[str]) -> list[str]:
    """The names of the weights that a reserved word targets, in model order.

    Args:
        model: the model.
        word: ``"all-key-value"`` (the key and value projections of each attention, or the projection that computes
            queries, keys and values together) or ``"all-feedforward"`` (the last layers of each feed-forward block).
        argument: the argument that the word was passed to, for the error message.
        heads: modules to leave out.

    Raises:
        TargetError: if the model has no such weight.
    """
    kind, role = ("attention", _keys_and_values) if word == "all-key-value" else ("feedforward", _outputs)
    names = [name for sublayer in find_sublayers(model) if sublayer.kind == kind for name in role(sublayer)]
    names = [name for name in names if not is_within(name, *heads)]
    if not names:
        raise TargetError(
            f"{argument}={word!r} finds nothing that looks like {_ROLES[word]} in this model. Pass patterns of the "
            f"layers to scale, or {argument}=() to scale none{why_frozen(model)}"
        )
    return names


def _keys_and_values(attention: Sublayer) -> list[str]:
    separate = [name for name in attention.sites if _KEY_VALUE.fullmatch(label(name))]
    return separate or [name for name in attention.sites if _FUSED.fullmatch(label(name))]


def _outputs(feedforward: Sublayer) -> list[str]:
    return list(feedforward.outputs)
