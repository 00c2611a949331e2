"""Notes for the report on weights that ``all-linear`` leaves out although they may be those of linear layers."""

from __future__ import annotations

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import join, leaf, listed
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part
from lightning_peft.core.targeting.layouts import layout_of
from lightning_peft.core.targeting.linear_like import linear_form, may_be_linear
from lightning_peft.core.targeting.sites import accepted_hint, weight_sites

__all__ = ["left_out_notes"]


def left_out_notes(model: nn.Module) -> list[str]:
    """Return a note for each class of layers that hold the weight of a linear layer, or a stack of such weights."""
    left_alone, sites = in_frozen_part(model), weight_sites(model)
    single: dict[str, list[str]] = {}
    for name, module in base_modules(model):
        cls = original_class(module)
        own = name and may_be_linear(module) and not cls.__module__.startswith("torch.") and not left_alone(name)
        if own and layout_of(module) is None:
            single.setdefault(cls.__name__, []).append(name)
    stacked: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.is_bare and not left_alone(name) and len(site.shape) == 3 and min(site.shape) > 1:
            stacked.setdefault(original_class(site.module).__name__, []).append(name)
    notes = []
    for kind, names in single.items():
        if linear_form(model.get_submodule(names[0])) == "transposed":
            why, call = "it stores W as (in, out)", f"register it: lp.register_linear({kind}, transposed=True)"
        else:
            why = "a trial call did not compute F.linear(x, weight, bias)"
            call = f"register it if it is a linear layer: lp.register_linear({kind})"
        hint = accepted_hint([join(names[0], "weight")], sites)
        by_name = f"Name {hint!r} in targets, or {call}" if hint else call[0].upper() + call[1:]
        notes.append(f"all-linear leaves out {listed(names)} ({kind}): {why}. {by_name}")
    for kind, names in stacked.items():
        short = [leaf(names[0])] if leaf(names[0]) != "weight" else []
        hint = accepted_hint([*short, names[0]], sites)
        by_name = f". Name it in targets to adapt each, for example {hint!r}" if hint else ""
        notes.append(f"all-linear leaves out {listed(names)} ({kind}): it holds one matrix per expert or type{by_name}")
    return notes
