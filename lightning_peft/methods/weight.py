"""The family of weight methods: an adapter that is a function of a matrix, at every matrix that is targeted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import nn

from lightning_peft.core.adapter import Adapter, WeightAdapter, WeightGroup
from lightning_peft.core.inject import Plan
from lightning_peft.core.sites import Site, find_sites
from lightning_peft.core.swap import original_class
from lightning_peft.methods.callback import PEFTMethod

__all__ = ["WeightMethod"]


class WeightMethod(PEFTMethod):
    """Base class of the methods that change weights; a subclass gives :meth:`build`.

    Example::

        class Shift(lp.WeightMethod):
            def build(self, site):
                return ShiftAdapter(site)

        class ShiftAdapter(lp.WeightAdapter):
            def __init__(self, site):
                super().__init__(site)
                self.rows = nn.Parameter(torch.zeros(site.shape[-2], 1))

            def delta(self, weight):
                return self.rows.expand_as(weight)
    """

    @abstractmethod
    def build(self, site: Site) -> WeightAdapter:
        """A new adapter for ``site``, initialised; random numbers come from torch's seeded global stream.

        Raises:
            ValueError: the arguments do not fit this weight, named with what was expected.
        """
        raise NotImplementedError

    def build_all(self, sites: Mapping[str, Site]) -> dict[str, WeightAdapter]:
        """A new adapter for each site, by name; override it where adapters share something."""
        built = {}
        for name, site in sites.items():
            with self.initialising(name):
                built[name] = self.build(site)
        return built

    def plan(self, model: nn.Module) -> Plan:
        plan = Plan(train_modules=self.heads(model))
        heads = [*plan.train_modules]
        sites, left_out = find_sites(model, self.targets, self.exclude, heads)
        for head in left_out:
            if head not in heads:
                plan.notes.append(
                    f"{head} (the output head) is left as it is; name it in targets or trainable to train it"
                )
        built: dict[str, dict[str, WeightAdapter]] = {}
        for name, adapter_at in self.build_all(sites).items():
            built.setdefault(sites[name].host, {})[name] = adapter_at
        for host, adapters in built.items():
            module = model.get_submodule(host)
            kind = original_class(module).__name__
            shapes = " + ".join("x".join(map(str, sites[name].shape)) for name in adapters)
            what = f"{self.describe(next(iter(adapters.values())))} on {kind} {shapes}"
            whole = len(adapters) == 1 and sites[next(iter(adapters))].parameter == "weight"
            adapter: Adapter = next(iter(adapters.values()))
            if not whole:
                adapter = WeightGroup({a.parameter: a for a in adapters.values()})
            shown = host if whole or len(adapters) > 1 else next(iter(adapters))
            plan.attach.append((host, shown, adapter, what))
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        """One adapter in a few words, for the table."""
        return type(self).__name__
