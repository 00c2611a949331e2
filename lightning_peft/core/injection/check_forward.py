"""Try out, before anything is changed, adapters that may not fit the way in which a module computes."""

from __future__ import annotations

import copy

from torch import nn

from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.injection.attach import attach
from lightning_peft.core.names import around_all, relative
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.trial_forward import failure

__all__ = ["forward_problem"]


def forward_problem(model: nn.Module, plan: Plan) -> str | None:
    """Why the adapters of ``plan`` do not fit, found by a forward without values; None if they do or it is unknown.

    The forward is that of the outermost module around all of them that can be tried. Only the adapters' own
    errors count: other errors may come from the trial. A model that carries adapters already is not tried.
    """
    misfits = tuple({kind for a in plan.attach for kind in a.adapter.misfit_errors})
    if not misfits or next(hosts(model), None) is not None:
        return None
    for around in around_all(a.host for a in plan.attach):

        def install(twin: nn.Module, around: str = around) -> None:
            for a, adapter in zip(plan.attach, copy.deepcopy([a.adapter for a in plan.attach])):
                for part in adapter.modules():
                    vars(part).update({k: v for k, v in _LENIENT.items() if k in vars(part)})
                attach(twin, relative(a.host, around), "trial", adapter.to("meta"))

        tried, error = failure(model.get_submodule(around), install)
        if tried:
            return str(error) if isinstance(error, misfits) else None
    return None


#: what a trial leaves out: the comparison of a cached step needs values, and the trial's input has any length
_LENIENT = {"cache_checked": True, "limit": None}
