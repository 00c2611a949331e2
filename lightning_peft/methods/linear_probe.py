"""Linear probe: only the output head trains, on the features of a frozen base.

    y = V f(x) + c,    V, c trained, f frozen

Only the parameters of the head train: classes x (features + 1) for a linear head. It measures how useful the base's
features are without changing them, and is the first stage of "linear probing, then fine-tuning".

Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644;
Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features", arXiv:2202.10054.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field
from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, listed
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part, why_frozen
from lightning_peft.core.targeting.patterns import TargetError, match_modules
from lightning_peft.methods.families.selection import SelectionMethod, head_module, parameters_in

__all__ = ["LinearProbe"]


class LinearProbe(SelectionMethod):
    """Linear probing: trains the output head and freezes the base (arXiv:1610.01644).

    Choose it when data is scarce or the base already separates the classes, or as a lower bound in a comparison. It
    costs almost nothing, because no gradient flows into the base, but it cannot learn features that the base does not
    have.

    Args:
        targets: ``"head"`` (the output head found in the model, including dense layers before it that belong to it), or
            patterns of the modules to use as the head.
        exclude: patterns of modules inside the head that stay frozen.
        trainable: patterns of the head, as an alternative to ``targets``; the output head is then not searched for.

    Raises:
        TargetError: if the output head cannot be determined, or a pattern matches nothing.

    Example::

        trainer = L.Trainer(callbacks=[lp.LinearProbe()])
    """

    parameter_count = "the head"

    targets: str | Sequence[str] = field(default="head", kw_only=False)

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        inside = [name for head in plan.train_modules for name in parameters_in(model, head)]
        if not parameters_in(model, "").keys() - {*inside, *plan.train}:
            raise TargetError(
                f"LinearProbe would train the whole {original_class(model).__name__}: {listed(plan.train_modules)} "
                "holds all of its parameters. Name the head in trainable, or use lp.FullFineTuning()"
            )
        return plan

    def choose(self, model: nn.Module, plan: Plan) -> None:
        patterns = self.patterns("head")
        if patterns:
            return self.add_modules(model, match_modules(model, patterns, "targets"), plan)
        if plan.train_modules:
            return None
        head = head_module(model)
        if head is None:
            left_alone = in_frozen_part(model)
            layers = [n for n, m in base_modules(model) if n and any(True for _ in m.parameters(recurse=False))]
            last = [name for name in layers if not left_alone(name)][-3:]
            raise TargetError(
                f"LinearProbe finds no output head in {original_class(model).__name__}: "
                + (f"name it, for example trainable=[{last[-1]!r}]; the last layers are {last}" if last else "no layer")
                + why_frozen(model)
            )
        self.add_modules(model, [head], plan)
        inside = {id(p) for p in model.get_submodule(head).parameters()}
        owners = model.named_parameters(remove_duplicate=False)
        tied = sorted(n for n, p in owners if id(p) in inside and not is_within(n, head))
        if tied:
            plan.notes.append(f"{head} shares its weight with {', '.join(tied)}, which trains with it")
        return None
