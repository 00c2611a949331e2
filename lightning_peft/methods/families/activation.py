"""The family of activation methods: an adapter changes the output of each targeted module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from attrs import field
from torch import nn

from lightning_peft.core.adapters.activation import ActivationAdapter, InputCapture
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.activation_sites import ActivationSite, find_activation_sites
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.arguments import optional, positive_int
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["ActivationMethod"]


class ActivationMethod(PEFTMethod):
    """Base class of the methods that change activations; a subclass implements :meth:`build`.

    Args:
        targets: ``"all-attention"``, ``"all-feedforward"`` (the outputs of these sub-layers, before residual sum and
            norm), ``"all-blocks"``, ``"all-linear"``, patterns of modules, or a list of these. A ``Sequential`` is
            adapted at its last layer.
        width: number of features of the targeted outputs; None infers it from the layers of each module.
        channels_first: True if these outputs are feature maps (N, C, ...); None infers it from the layers.

    Raises:
        TargetError: if nothing in the model matches ``targets``, or a width cannot be determined.

    Example::

        class Shift(lp.ActivationMethod):
            def build(self, site):
                return ShiftAdapter(site)

        class ShiftAdapter(lp.ActivationAdapter):
            def __init__(self, site):
                super().__init__(site)
                self.shift = nn.Parameter(torch.zeros(site.width))

            def forward(self, x, y):
                return y + self.shift
    """

    targets: str | Sequence[str] = field(default="all-feedforward", kw_only=False)
    width: int | None = field(default=None, validator=optional(positive_int))
    channels_first: bool | None = None

    @abstractmethod
    def build(self, site: ActivationSite) -> ActivationAdapter:
        """Return a new, initialised adapter for ``site``; torch's global generator is seeded for the call.

        Raises:
            ValueError: if the arguments do not fit this module.
        """
        raise NotImplementedError

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        sites = find_activation_sites(
            model, self.targets, self.exclude, plan.train_modules, self.width, self.channels_first
        )
        for site in sites:
            with self.seeded_init(site.host):
                adapter = self.build(site)
            if adapter.reads_input and site.start != site.host:
                capture = InputCapture(site.host)
                adapter.captures = (capture,)
                what = f"captures the input for the adapter at {site.host}"
                plan.attach.append(Attachment(site.start, site.start, capture, what))
            kind = original_class(site.module).__name__
            what = f"{self.describe(adapter)} on {kind} {site.width}"
            plan.attach.append(Attachment(site.host, site.host, adapter, what))
        hosts = [a.host for a in plan.attach]
        twice = [host for host in hosts if hosts.count(host) > 1]
        if twice:
            raise TargetError(f"targets={self.targets!r} matches {twice[0]!r} in two ways: exclude one of them")
        return plan

    def describe(self, adapter: ActivationAdapter) -> str:
        """Describe one adapter in a few words, for the report's table."""
        return type(self).__name__
