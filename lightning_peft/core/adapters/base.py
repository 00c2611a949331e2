"""What an adapter is: the small module that one method puts into one module of the base.

A weight method subclasses :class:`WeightAdapter` and gives ``delta`` (or ``transform``); forward, merge, types,
convolutions and embeddings follow. Where it can be computed more cheaply on activations, it gives ``output`` as
well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.batching.batched import BatchedAdapters, PerGroupOutput
from lightning_peft.core.targeting.sites import Site

__all__ = ["BIASES", "Adapter", "WeightAdapter", "WeightGroup"]

#: the bias that goes with a weight, by name in the host
BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"}


class Adapter(nn.Module):
    """Base class of all adapters: runs around the module that carries it.

    Most adapters derive from :class:`lightning_peft.WeightAdapter` or :class:`lightning_peft.ActivationAdapter`.

    Example::

        class Noise(lp.Adapter):
            def run(self, host, call, *args, **kwargs):
                y = call(*args, **kwargs)
                return y + 0.01 * torch.randn_like(y) if self.training else y
    """

    #: what it raises in a forward of a module that it does not fit; a trial forward before injection looks for these
    misfit_errors: ClassVar[tuple[type[Exception], ...]] = ()
    #: whether it only looks on, so that the module computes the same with it as without
    is_passthrough: ClassVar[bool] = False
    #: whether a batch without certain tokens leaves it without a gradient
    needs_its_tokens: ClassVar[bool] = False

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The host's output, given ``call``, the host's forward with the adapters before this one."""
        raise NotImplementedError

    def weights(self) -> Mapping[str, WeightAdapter]:
        """The adapters of the host's weights in this one, by parameter name; empty where it has none."""
        return {}

    def overrides(self) -> Mapping[str, Tensor]:
        """What stands in place of the host's own parameters and buffers, by name; empty where nothing does."""
        return {}

    def changes(self) -> frozenset[str]:
        """The names of the host's parameters and buffers that have another value with this adapter."""
        found = {*self.overrides(), *self.weights()}
        changed = {p for p, part in self.weights().items() if part.changes_bias and p in BIASES}
        return frozenset(found | {BIASES[parameter] for parameter in changed})

    def unreadable(self) -> str | None:
        """Why code that reads an adapted weight cannot get what this adapter does to it now; None if it can."""
        return next((why for part in self.weights().values() if (why := part.unreadable()) is not None), None)

    @property
    def needs_input(self) -> str | None:
        """What this adapter does to the input of a module while training, which no weight can do; None if nothing."""
        return next((what for part in self.weights().values() if (what := part.needs_input) is not None), None)

    @property
    def replacement(self) -> Adapter | None:
        """The copies of parameters that go with this adapter and come ahead of it; None where there are none."""
        return self._modules.get("replacement")  # type: ignore[return-value]

    def components(self) -> tuple[Adapter, ...]:
        """What runs for this adapter, in order."""
        return (self,) if self.replacement is None else (self.replacement, self)

    @property
    def modifies_weight(self) -> bool:
        """Whether the host must run with its adapted weight in place instead of around its own."""
        return False

    #: whether its parts at several hosts work on one sequence, so that a batch of rows must pass all of them together
    spans_hosts = False
    #: what captures the input of another module for it
    captures: tuple[Any, ...] = ()

    def batched_class(self, host: nn.Module) -> Callable[..., BatchedAdapters] | None:
        """What lets adapters of this kind serve one batch whose rows name different ones, and the same for all of them.

        None where the host has to run once for each adapter. See :mod:`lightning_peft.core.switching.rows`.
        """
        return None

    @property
    def has_reparameterization(self) -> bool:
        """Whether :meth:`fold` would change anything."""
        return False

    def remove_reparameterization(self) -> None:
        """Replace what only training needs by the parameters it computes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        # Adapters train in the type they were made in: casting a model down (``model.half()``, Lightning's
        # bf16-true) must not cost the small parameters their precision. Casting up is followed.
        # ``to_empty`` gives values to what has none; adapters have theirs, on a base on the meta device too.
        empties = _empties(fn)

        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if empties and not t.is_meta:
                return t.to(out.device)
            lower = out.is_floating_point() and torch.finfo(out.dtype).eps > torch.finfo(t.dtype).eps
            return t.to(out.device) if lower else out

        return super()._apply(keep_precision, recurse)  # type: ignore[return-value]


def _empties(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``fn`` copies no values: only then does it make a real tensor of one on the meta device."""
    try:
        return not fn(torch.empty(0, device="meta")).is_meta
    except (NotImplementedError, RuntimeError):
        return False


class WeightAdapter(Adapter):
    """An adapter that is a function of a matrix.

    Args:
        site: the weight it adapts; gives ``site.shape``, the matrix's shape (out, in), or (batch, out, in) for
            stacked experts.

    Example::

        class RowScaleAdapter(lp.WeightAdapter):
            def __init__(self, site):
                super().__init__(site)
                self.scale = nn.Parameter(torch.ones(*site.shape[:-1], 1))

            def transform(self, weight):
                return self.scale * weight

        class RowScale(lp.WeightMethod):
            def build(self, site):
                return RowScaleAdapter(site)

        lp.apply(model, RowScale(targets=["q_proj"]))
        lp.merge(model)
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site_name = site.name
        self.parameter = site.parameter
        self.layout = site.layout

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to the matrix ``weight`` (..., out, in); the same shape."""
        raise NotImplementedError

    def transform(self, weight: Tensor) -> Tensor:
        """The adapted matrix; override it where the method is no sum."""
        return weight + self.delta(weight)

    @property
    def changes_bias(self) -> bool:
        """Whether :meth:`transform_bias` changes anything."""
        return type(self).transform_bias is not WeightAdapter.transform_bias

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        """The adapted bias (out,), for methods that change it with the weight; None where there is none."""
        return bias

    @property
    def needs_input(self) -> str | None:
        return None

    def unreadable(self) -> str | None:
        if self.needs_input is None or not self.training:
            return None
        return (
            f"{self.needs_input} is not supported on {self.site_name!r}: another module reads this weight and "
            "computes without calling its layer. Set dropout=0, or exclude it"
        )

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A (..., k, in) and B (..., out, k) whose product B A is :meth:`delta`; None where there is no such form."""
        return None

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The host's output from its input ``x`` and its output ``y`` so far, without forming the matrix.

        Optional, and equal to running with :meth:`transform`. ``self.layout`` has the layer's operation.
        """
        raise NotImplementedError

    @property
    def modifies_weight(self) -> bool:
        return type(self).output is WeightAdapter.output or not self.layout.has_activation

    def weights(self) -> Mapping[str, WeightAdapter]:
        return {self.parameter: self}

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.output(host, self.reads(args, kwargs), call(*args, **kwargs))

    def reads(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The input of :meth:`output` in a call of the host."""
        return args[0] if args else next(iter(kwargs.values()))

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The new output of some rows, given their input and their output so far."""
        return self.output(host, x, y)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        around = not self.modifies_weight and type(self).run is WeightAdapter.run
        return PerGroupOutput if around else None


class WeightGroup(Adapter):
    """The adapters of several weights of one host (an attention's projections, experts), by parameter name."""

    def __init__(self, adapters: Mapping[str, WeightAdapter]) -> None:
        super().__init__()
        for parameter, adapter in adapters.items():
            key = parameter.removesuffix(".weight")
            self.add_module(f"{key}_" if hasattr(self, key) else key, adapter)  # such as 'weights' or 'run'

    @property
    def modifies_weight(self) -> bool:
        return True

    def weights(self) -> Mapping[str, WeightAdapter]:
        return {a.parameter: a for a in self.children() if isinstance(a, WeightAdapter)}
