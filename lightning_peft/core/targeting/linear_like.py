"""Linear layers that do not derive from ``nn.Linear``: recognised by a trial call, or registered by the user."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_peft.core.class_swap import original_class, own_forward
from lightning_peft.core.targeting.computed_weights import computed_names, effective_tensors, plain_class, sources_of

__all__ = ["LinearForm", "linear_form", "may_be_linear", "output_features", "register_linear", "registered_form"]

#: how a layer computes: ``"linear"`` is F.linear(x, weight, bias), ``"transposed"`` is x @ weight + bias
LinearForm = Literal["linear", "transposed"]
M = TypeVar("M", bound=type[nn.Module])

_REGISTERED: dict[type[nn.Module], LinearForm] = {}
#: results of trial calls: by class, sizes and plain attributes if the layer has no other state, else by the layer
_BY_KIND: dict[Any, LinearForm | None] = {}
_BY_LAYER: weakref.WeakKeyDictionary[nn.Module, LinearForm | None] = weakref.WeakKeyDictionary()


def register_linear(cls: M, transposed: bool = False) -> M:
    """Declare that ``cls`` is a linear layer, so that ``all-linear`` includes it and patterns match it.

    Layers that compute ``F.linear(x, self.weight, self.bias)`` with one argument and no other state are recognised
    without this. A registered layer whose forward computes something different with its weight is adapted by placing
    the adapted weight in it, which is correct for any forward that reads ``self.weight``.

    Args:
        cls: a module class with a 2-D floating-point parameter ``weight``; subclasses are included.
        transposed: whether ``weight`` is stored as (in, out), as in ``x @ self.weight``.

    Returns:
        ``cls``, so that it can be used as a decorator.

    Raises:
        TypeError: if ``cls`` is not a class of modules.

    Example::

        @lp.register_linear
        class Scaled(nn.Module):
            def __init__(self, inputs, outputs):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(outputs, inputs))

            def forward(self, x, scale=1.0):
                return scale * nn.functional.linear(x, self.weight)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_linear takes a subclass of nn.Module, got {cls!r}")
    _REGISTERED[cls] = "transposed" if transposed else "linear"
    return cls


def registered_form(module: nn.Module) -> LinearForm | None:
    """The form that a class of ``module`` was registered with; None if none was, or it has no matrix ``weight``."""
    if not _is_matrix(effective_tensors(module).get("weight")):
        return None
    return next((_REGISTERED[c] for c in original_class(module).__mro__ if c in _REGISTERED), None)


def may_be_linear(module: nn.Module) -> bool:
    """Whether ``module`` has the state of a linear layer: a floating-point matrix ``weight`` and maybe a bias."""
    own = effective_tensors(module)
    of_weight = sources_of(module, "weight") if own.keys() - module._parameters.keys() else []
    children = module._modules.keys() - {"adapters", "parametrizations"}
    if not _is_matrix(own.get("weight")) or children or module._buffers.keys() - of_weight:
        return False
    bias = own.get("bias")
    return own.keys() <= {"weight", "bias"} and (bias is None or bias.ndim == 1)


def _is_matrix(weight: Tensor | None) -> bool:
    return weight is not None and not is_lazy(weight) and weight.ndim == 2 and weight.is_floating_point()


def output_features(module: nn.Module) -> int | None:
    """The number of output features of a linear layer that does not derive from ``nn.Linear``; None otherwise."""
    form = registered_form(module) or linear_form(module)
    return (
        None if form is None else cast(Tensor, effective_tensors(module)["weight"]).shape[0 if form == "linear" else 1]
    )


def linear_form(module: nn.Module) -> LinearForm | None:
    """The form in which ``module`` computes, found by calling a copy of it; None if it computes something else.

    The copy has other values of the same sizes, in float64. Its output must be that of the form on inputs of several
    magnitudes and dimensions, in training and in evaluation mode, so a forward that clips, scales, masks, normalises or
    adds noise is not taken for a linear layer. ``module``, its random numbers and its counters stay as they are.
    """
    if not may_be_linear(module) or own_forward(module) is not None or not _takes_one_argument(plain_class(module)):
        return None
    key = _kind(module)
    if key is None:
        if module not in _BY_LAYER:
            _BY_LAYER[module] = _try(module)
        return _BY_LAYER[module]
    if key not in _BY_KIND:
        _BY_KIND[key] = _try(module)
    return _BY_KIND[key]


def _takes_one_argument(cls: Any) -> bool:
    try:
        given = [p for p in list(inspect.signature(cls.forward).parameters.values())[1:] if p.kind in (0, 1)]
    except (TypeError, ValueError):
        return False
    return len(given) > 0 and all(p.default is not p.empty for p in given[1:])


def _kind(module: nn.Module) -> Any:
    """A key for the cached result of a trial call; None if the result depends on more than plain values."""
    cls: Any = plain_class(module)
    own = effective_tensors(module)
    state = {k: v for k, v in _attributes(module).items() if k not in vars(_PLAIN) and not k.startswith("_peft")}
    if not all(isinstance(v, int | float | str | bool | type(None)) for v in state.values()):
        return None
    shapes = tuple((name, None if p is None else p.shape) for name, p in own.items())
    return cls, cls.forward, shapes, tuple(state.items())


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of ``module`` without the weights that a hook has stored."""
    computed = computed_names(module)
    return {name: value for name, value in vars(module).items() if name not in computed}


#: a module without state: its attributes are those that torch gives every module
_PLAIN = nn.Module()


@torch.no_grad()
def _try(module: nn.Module) -> LinearForm | None:
    cls: Any = plain_class(module)
    own = effective_tensors(module)
    parameters = {name: None if p is None else nn.Parameter(_values(p.shape)) for name, p in own.items()}
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    forms: dict[LinearForm, Callable[[Tensor], Tensor]] = {
        "linear": lambda x: F.linear(x, weight, bias),
        "transposed": lambda x: x @ weight if bias is None else x @ weight + bias,
    }
    widths: dict[LinearForm, int] = {"linear": weight.shape[1], "transposed": weight.shape[0]}
    for form, expected in forms.items():
        outputs = {"linear": weight.shape[0], "transposed": weight.shape[1]}[form]
        if (bias is None or len(bias) == outputs) and all(
            _equal(cls, module, parameters, training, x, expected(x))
            for training in (True, False)
            for x in _inputs(widths[form])
        ):
            return form
    return None


def _inputs(width: int) -> list[Tensor]:
    magnitudes = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(3, 1, 1)
    x = _values((3, 2, width)) * magnitudes
    return [x, x[1], x[2].neg(), x.view(3, 1, 2, width)]


def _values(shape: tuple[int, ...]) -> Tensor:
    """Numbers of both signs that no permutation or transposition of the tensor leaves in place."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64, device="cpu").mul_(0.7).sin_().view(shape)


def _equal(cls: Any, module: nn.Module, parameters: dict, training: bool, x: Tensor, expected: Tensor) -> bool:
    twin = cls.__new__(cls)
    # A forward may write into containers, which a shallow copy would share.
    vars(twin).update({k: copy.copy(v) if type(v) in (list, dict, set) else v for k, v in _attributes(module).items()})
    vars(twin).update(_modules={}, _buffers={}, _parameters=dict(parameters), training=training)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = cls.forward(twin, x.clone())
        except Exception:  # the user's forward may raise anything on this input
            return False
    same = isinstance(got, Tensor) and got.shape == expected.shape and got.dtype == expected.dtype
    return same and torch.allclose(got, expected, rtol=1e-9, atol=1e-12 * float(x.abs().max()))
