"""Run a trial forward with adapters that may not fit their host, before anything is changed."""

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
    """Return why the adapters of ``plan`` do not fit, found by a trial forward; None if they fit, or if no trial is
    possible.

    The trial runs the outermost module around all adapters for which it is possible. Only errors declared in
    ``misfit_errors`` count, because other errors may be caused by the trial. A model with adapters is not tried.
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


#: checks that a trial skips: comparing a cached step needs values, and the length of the trial input is arbitrary
_LENIENT = {"cache_checked": True, "limit": None}
