"""The base classes of adapters: the small modules that a method inserts into modules of the base.

A weight method subclasses :class:`WeightAdapter` and implements ``delta``, or ``transform`` if the change is not
additive; forward, merge, dtypes, convolutions and embeddings then work automatically. It may also implement ``output``
if the update is cheaper to compute on activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.batching.batched import BatchedAdapters, PerGroupOutput
from lightning_peft.core.targeting.sites import Site

__all__ = ["BIASES", "Adapter", "WeightAdapter", "WeightGroup", "derive_flags"]

#: maps the name of a weight in its host to the name of its bias
BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"}


class Adapter(nn.Module):
    """Base class of all adapters. An adapter runs around the module that carries it, its host.

    Most adapters derive from :class:`lightning_peft.WeightAdapter` or :class:`lightning_peft.ActivationAdapter`.

    Example::

        class Noise(lp.Adapter):
            def run(self, host, call, *args, **kwargs):
                y = call(*args, **kwargs)
                return y + 0.01 * torch.randn_like(y) if self.training else y
    """

    #: errors that the host's forward raises if the adapter does not fit; the trial before injection catches these
    misfit_errors: ClassVar[tuple[type[Exception], ...]] = ()
    #: True if the adapter never changes the module's output
    is_passthrough: ClassVar[bool] = False
    #: True if the adapter gets no gradient from a batch that lacks certain tokens
    needs_its_tokens: ClassVar[bool] = False
    #: the tensors that determine the adapter's effect, each with its value for no effect; see :func:`lp.scale`
    neutral: ClassVar[Mapping[str, float] | None] = None
    #: why an adapter without ``neutral`` cannot be scaled
    unscalable: ClassVar[str] = (
        "its class does not say at which values of its parameters it has no effect. Declare them in a class attribute "
        'neutral, such as {"lora_B": 0.0}'
    )

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the host's output; ``call`` runs the host's forward with the adapters before this one."""
        raise NotImplementedError

    def weights(self) -> Mapping[str, WeightAdapter]:
        """Return the weight adapters that this adapter consists of, by parameter name in the host."""
        return {}

    def overrides(self) -> Mapping[str, Tensor]:
        """Return values that replace parameters and buffers of the host while the adapter runs, by name."""
        return {}

    def changes(self) -> frozenset[str]:
        """Return the names of the host's parameters and buffers whose value this adapter changes."""
        found = {*self.overrides(), *self.weights()}
        changed = {p for p, part in self.weights().items() if part.changes_bias and p in BIASES}
        return frozenset(found | {BIASES[parameter] for parameter in changed})

    def unreadable(self) -> str | None:
        """Return why code that reads an adapted weight cannot get the correct value now; None if it can."""
        return next((why for part in self.weights().values() if (why := part.unreadable()) is not None), None)

    def neutral_values(self, host: nn.Module) -> Mapping[str, Tensor | float] | None:
        """Return :attr:`neutral`; override it if the values depend on the host or on options."""
        return self.neutral

    @property
    def needs_input(self) -> str | None:
        """An operation on the host's input in training that no weight can express, such as ``"dropout"``; else None."""
        return next((what for part in self.weights().values() if (what := part.needs_input) is not None), None)

    @property
    def replacement(self) -> Adapter | None:
        """The parameter overrides that belong to this adapter and run before it; None if there are none."""
        return self._modules.get("replacement")  # type: ignore[return-value]

    def components(self) -> tuple[Adapter, ...]:
        """The adapters that run for this one, in order: its parameter overrides, then itself."""
        return (self,) if self.replacement is None else (self.replacement, self)

    @property
    def modifies_weight(self) -> bool:
        """Whether the host must run with the adapted weight in place, instead of the adapter running around it."""
        return False

    #: True if the adapters on several hosts share one token sequence: a mixed batch must then be split around all of
    #: them
    spans_hosts = False
    #: adapters on other modules that capture their input for this one
    captures: tuple[Any, ...] = ()

    def batched_class(self, host: nn.Module) -> Callable[..., BatchedAdapters] | None:
        """Return the class that runs several adapters of this type in one forward over a mixed batch.

        None if the host must run once for each adapter. Adapters for which it returns equal values share a forward. See
        :mod:`lightning_peft.core.switching.rows`.
        """
        return None

    @property
    def has_reparameterization(self) -> bool:
        """Whether :meth:`remove_reparameterization` would change anything."""
        return False

    def remove_reparameterization(self) -> None:
        """Replace a reparameterization that only training needs by the values that it computes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        # Adapters keep training in the dtype they were created in: casting a model down (``model.half()``, Lightning's
        # bf16-true) must not reduce the precision of these small parameters. Casting up is applied.
        # ``to_empty`` allocates tensors of a meta model without values. Adapters on such a base already have values,
        # which must be kept.
        empties = _empties(fn)

        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if empties and not t.is_meta:
                return t.to(out.device)
            lower = out.is_floating_point() and torch.finfo(out.dtype).eps > torch.finfo(t.dtype).eps
            return t.to(out.device) if lower else out

        return super()._apply(keep_precision, recurse)  # type: ignore[return-value]


def _empties(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``fn`` allocates without copying values: only then does it turn a meta tensor into a real one."""
    try:
        return not fn(torch.empty(0, device="meta")).is_meta
    except (NotImplementedError, RuntimeError):
        return False


def derive_flags(cls: type, rules: Mapping[str, Mapping[str, bool | None]]) -> None:
    """Set flags on ``cls`` that state how its methods relate, such as whether ``output`` equals ``transform``.

    A flag that is set in the class body is kept. Otherwise the first class in the method resolution order that sets the
    flag or defines one of its methods decides, so an override never inherits a flag that described the method it
    replaces.

    Args:
        cls: a new class.
        rules: flag -> the methods it is about, each with the flag's value after an override; the last one decides if a
            class overrides several.
    """
    for flag, methods in rules.items():
        for own in map(vars, cls.__mro__):
            found = [own[flag]] if flag in own else [value for method, value in methods.items() if method in own]
            if found:
                setattr(cls, flag, found[-1])
                break


class WeightAdapter(Adapter):
    """An adapter that is a function of a weight matrix.

    Args:
        site: the weight it adapts. ``site.shape`` is the shape of the matrix: (out, in), or (batch, out, in) for
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

    #: whether :meth:`output` computes the same as :meth:`transform`; overriding one of the other two alone unsets it
    has_output: ClassVar[bool] = False
    #: whether :meth:`transform` adds :meth:`delta`
    transform_is_sum: ClassVar[bool] = True
    #: whether :meth:`transform_bias` changes anything; an instance may set it
    changes_bias: bool = False
    #: whether :meth:`run` is the forward followed by :meth:`after`
    run_is_forward_and_after: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        derive_flags(
            cls,
            {
                "has_output": {"delta": False, "transform": False, "output": True},
                "transform_is_sum": {"transform": False},
                "changes_bias": {"transform_bias": True},
                "run_is_forward_and_after": {"run": False},
                "neutral": {"delta": None, "transform": None, "transform_bias": None},
            },
        )

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site_name = site.name
        self.parameter = site.parameter
        self.layout = site.layout

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update that is added to the matrix ``weight`` (..., out, in), in the same shape."""
        raise NotImplementedError

    def transform(self, weight: Tensor) -> Tensor:
        """Return the adapted matrix. Override it if the change is not additive."""
        return weight + self.delta(weight)

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the adapted bias (out,), for methods that also change the bias; None if the layer has no bias."""
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
        """Return A (..., k, in) and B (..., out, k) with B A equal to :meth:`delta`; None if there is no such form."""
        return None

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the host's new output, given its input ``x`` and its output ``y`` so far, without forming the matrix.

        Optional. The result must equal running the host with :meth:`transform`; use the layer's operation in
        ``self.layout``.
        """
        raise NotImplementedError

    @property
    def modifies_weight(self) -> bool:
        return not self.has_output or not self.layout.has_activation

    def weights(self) -> Mapping[str, WeightAdapter]:
        return {self.parameter: self}

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.output(host, self.reads(args, kwargs), call(*args, **kwargs))

    def reads(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the host's input, which :meth:`output` gets as ``x``, from the arguments of a call."""
        return args[0] if args else next(iter(kwargs.values()))

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output of some rows, given their input and their output so far."""
        return self.output(host, x, y)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        return PerGroupOutput if self.run_is_forward_and_after and not self.modifies_weight else None


class WeightGroup(Adapter):
    """The weight adapters of several weights of one host (an attention's projections, experts)."""

    def __init__(self, adapters: Mapping[str, WeightAdapter]) -> None:
        super().__init__()
        for parameter, adapter in adapters.items():
            key = parameter.removesuffix(".weight")
            # A parameter may have the name of a method of this class, such as 'weights' or 'run'.
            self.add_module(f"{key}_" if hasattr(self, key) else key, adapter)

    @property
    def modifies_weight(self) -> bool:
        return True

    def weights(self) -> Mapping[str, WeightAdapter]:
        return {a.parameter: a for a in self.children() if isinstance(a, WeightAdapter)}
