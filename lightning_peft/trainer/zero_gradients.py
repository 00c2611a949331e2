"""Check that no adapter and no trained module has a gradient of exactly zero over the first optimizer steps.

Such an adapter or module has no effect on the loss: the run continues without an error, but it never learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import adapter_names, stacks
from lightning_peft.core.names import listed
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.sharded_tensors import local_part
from lightning_peft.trainer.audit import report
from lightning_peft.trainer.resume.rng_state import gather_ranks

__all__ = ["ZeroGradientAudit"]

_WINDOWS = 3  # the check ends after this many times ``steps``, even for groups with too few steps that count


@dataclass(frozen=True)
class _Group:
    """Parameters that are checked together: a description, and the adapter's name if they belong to one."""

    what: str
    adapter: str | None
    parameters: tuple[nn.Parameter, ...]


class ZeroGradientAudit:
    """Checks each adapter, each module trained together with adapters, and each selection method, as a whole.

    An adapter is checked as a whole because parts of it may rightly have zero gradients: LoRA's A while B is zero,
    parameters behind a gate of zero, ranks that DyLoRA did not sample. The largest gradients are kept on their device
    and read once every ``steps`` steps, so that a GPU is not synchronised in each step.

    Args:
        model: The module that trains.
        steps: The number of optimizer steps over which a gradient must be zero to be reported. Shorter runs are not
            checked.
    """

    def __init__(self, model: nn.Module, steps: int = 4) -> None:
        self.model, self.steps = model, steps
        self.groups = list(_groups(model))
        self._stacks = list(
            stacks(model).values()
        )  # computed once, because walking through all modules takes longer than the check
        self._moved = False
        self._largest: list[Tensor] = []  # per step: the largest gradient of each group, NaN if the step does not count

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the gradients before one step of ``optimizer``, and report after enough steps.

        Raises:
            AuditError: if a group had zero gradients throughout, unless the method's ``audit`` is ``"warn"`` or
                ``"off"``.
        """
        if not self.groups:
            return
        # During warmup at a learning rate of zero, a zero-initialised head stays zero, and so do gradients behind it.
        moving = [group for group in optimizer.param_groups if group.get("lr") != 0]
        stepped = {id(p) for group in moving for p in group["params"]}
        running = {n for s in self._stacks for n in (s.active if s.ever_routed is None else s.ever_routed)}
        found = []
        for group in self.groups:
            counts = group.adapter is None or group.adapter in running
            grads = [p.grad for p in group.parameters if counts and id(p) in stepped and p.grad is not None]
            found.append(_largest(grads))
        device = next((value.device for value in found if value.device.type != "cpu"), None)
        self._largest.append(torch.stack([value.to(device) for value in found]))
        if len(self._largest) % self.steps == 0:
            self._judge()

    def _judge(self) -> None:
        columns = torch.stack(self._largest).T.tolist()
        facts = [(sum(map(math.isfinite, c)), any(math.isfinite(v) and v > 0 for v in c)) for c in columns]
        # A rank sees only its part of a sharded gradient. The results are combined, so all ranks report the same.
        ranks = list(zip(*gather_ranks(facts)))
        still = [not any(moved for _, moved in group) for group in ranks]
        judged = [min(steps for steps, _ in group) >= self.steps for group in ranks]
        self._moved |= not all(still)
        zero = [group.what for group, here, known in zip(self.groups, still, judged) if here and known]
        if zero:
            self._report(zero)
        # Groups with too few steps so far are checked again later, up to the limit.
        waiting = [i for i in range(len(still)) if still[i] and not judged[i]]
        waiting = waiting if len(self._largest) < _WINDOWS * self.steps else []
        self.groups = [self.groups[i] for i in waiting]
        self._largest = [values[waiting] for values in self._largest] if waiting else []

    def _report(self, zero: list[str]) -> None:
        flat = (
            ""
            if self._moved
            else " All trainable gradients are zero, so the loss itself may be flat (a margin that is met, rewards "
            "that are all equal)."
        )
        report(
            self.model,
            f"the gradient of {listed(zero)} was exactly zero in each of the first {self.steps} optimizer steps: the "
            f"loss does not depend on it, so it learns nothing.{flat} Place it where it affects the loss (in a causal "
            "model no token sees a prompt with position='suffix': use position='prefix'), or remove it",
        )


def _largest(gradients: list[Tensor]) -> Tensor:
    """The largest absolute gradient; NaN if there are no gradients, 0 if this rank's shards of them are empty."""
    if not gradients:
        return torch.tensor(math.nan)
    parts = [part._values() if part.is_sparse else part for part in map(local_part, gradients)]
    parts = [part.abs() if part.is_complex() else part for part in parts if part.numel()]
    if not parts:
        return torch.tensor(0.0)
    # On the CPU five times as fast as torch._foreach_norm of infinite order.
    extremes = [value.to(parts[0].device, torch.float32) for part in parts for value in part.aminmax()]
    return torch.stack(extremes).abs().max()


def _groups(model: nn.Module) -> Iterator[_Group]:
    record = injection_state(model)
    root = injected_module(model)
    for name in adapter_names(model):
        adapters = [stack[name] for stack in stacks(model).values() if name in stack]
        # Adapters of single tokens are left out: they get a gradient only if their tokens occur in the batch.
        parts = [m for a in adapters for m in a.modules() if not (isinstance(m, Adapter) and m.needs_its_tokens)]
        yield _Group(f"adapter {name!r}", name, tuple(p for m in parts for p in m.parameters(recurse=False)))
    if record is None:
        return
    for name, trains in record.trained_base.items():
        modules = {module: tuple(root.get_submodule(module).parameters()) for module in trains.modules}
        if trains.adapters:
            yield from (_Group(f"module {module!r}", None, parameters) for module, parameters in modules.items())
        else:
            single = map(root.get_parameter, trains.parameters)
            parameters = (*single, *(p for part in modules.values() for p in part))
            yield _Group(f"parameters trained by {type(record.methods[name]).__name__} {name!r}", None, parameters)
