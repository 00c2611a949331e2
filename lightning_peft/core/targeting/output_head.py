"""Find the layer that produces a model's output: by a trial forward if possible, otherwise by name and order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.core.names import is_within, leaf, owner_of, relative
from lightning_peft.core.optional import output_embedding
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part
from lightning_peft.core.targeting.trial_forward import last_layers

if TYPE_CHECKING:
    from lightning_peft.core.targeting.sites import Site
__all__ = ["find_output_head", "how_head_was_found"]

_HEAD = re.compile(r"(.*_)?(head|heads|classifier|classification|fc|logits?|predictions?|score|output|out)(_.*)?")
_SURELY_HEAD = re.compile(r"(.*_)?(head|classifier|logits?)")


def find_output_head(model: nn.Module, sites: Mapping[str, Site]) -> str | None:
    """Return the name of the output layer, by the rules of :func:`lightning_peft.core.targeting.sites.output_head`."""
    return _find(model, sites)[0]


def how_head_was_found(model: nn.Module, sites: Mapping[str, Site]) -> str:
    """Return how the head was guessed, for the report; empty if the model or a trial forward confirmed it."""
    return _find(model, sites)[1]


def _find(model: nn.Module, sites: Mapping[str, Site]) -> tuple[str | None, str]:
    names = {id(site.module): name for name, site in sites.items()}
    for _, module in base_modules(model):
        head = output_embedding(module)
        if head is not None and id(head) in names:
            return names[id(head)], ""
    left_alone = in_frozen_part(model)
    every = [name for name, site in sites.items() if site.linear_like]
    linear = [name for name in every if not left_alone(name)]
    if len(every) < 2 or not linear or sites[linear[-1]].is_part:
        return None, ""
    # Only modules whose whole output comes from the weight count. A bare parameter's module computes more than that.
    called = [s.host for s in sites.values() if not s.is_bare]
    by_trial = last_layers(model, [host for host in dict.fromkeys(called) if host and not left_alone(host)])
    if by_trial:
        tried = sorted((n for n in linear if sites[n].host in by_trial), key=lambda n: by_trial.index(sites[n].host))
        last = linear[-1] if linear[-1] in tried else tried[-1] if tried else None
        return (last, "") if last is not None and not _repeated(model, last) else (None, "")
    alone = [name for name in linear if not _repeated(model, name)]
    last = linear[-1]
    usual = _HEAD if last in alone else _SURELY_HEAD
    named = [name for name in alone if usual.fullmatch(leaf(name))]
    if named and last not in named and (last not in alone or _outside(named[-1], last)):
        return named[-1], "by its name"
    return (last, "as the layer defined last") if last in alone else (None, "")


def _repeated(model: nn.Module, name: str) -> bool:
    """Whether the layer is one of many alike: inside a numbered module, or an entry of a ``ModuleList``."""
    *around, own = name.split(".")
    in_list = own.isdigit() and isinstance(model.get_submodule(".".join(around)), nn.ModuleList)
    return in_list or any(part.isdigit() for part in around)


def _outside(name: str, other: str) -> bool:
    """Whether ``other`` lies in another part of the model than ``name`` (an auxiliary network, not the next layer)."""
    around = owner_of(name)
    return not is_within(other, around) or "." in relative(other, around)
