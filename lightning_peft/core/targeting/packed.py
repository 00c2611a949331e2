"""Linear layers whose weight cannot be read as a matrix of numbers: quantised, packed, or a tensor subclass.

Such a layer can be used only by calling it. An adapter on activations runs beside the layer's own forward. An adapter
that needs the matrix gets it from :func:`dequantized`, for the duration of one computation. Both need the layer to
compute x W^T + b for some matrix W, with a gradient for x; a trial call checks it (:func:`packed_problem`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.targeting.base_modules import base_modules, base_state_dict
from lightning_peft.core.targeting.storage import storage_problem

__all__ = [
    "COMPRESSED",
    "count_parameters",
    "dequantized",
    "is_compressed",
    "is_packed",
    "keep_differentiable",
    "linear_sizes",
    "own_tensors",
    "packed_layers",
    "packed_note",
    "packed_problem",
    "parameter_sizes",
    "plain_tensors",
    "register_quantized",
    "size_in_bytes",
]

Dequantize = Callable[[Any], Tensor]
M = TypeVar("M", bound=type[nn.Module])

#: the largest relative error at which a layer counts as linear; layers that round activations to 8 bits come close
TOLERANCE = 0.05
#: why a layer of :func:`is_compressed` cannot change, as the end of a sentence
COMPRESSED = (
    "belongs to compressed-tensors, which unpacks it when the model first runs and packs it with its original scales "
    "when it is saved: load the model with quantization_config=CompressedTensorsConfig(dequantize=True)"
)
_REGISTERED: dict[type[nn.Module], Dequantize] = {}
#: results of trial calls, by layer
_PROBLEMS: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
_CHOSEN: weakref.WeakKeyDictionary[nn.Module, Dequantize] = weakref.WeakKeyDictionary()


def register_quantized(cls: M, dequantize: Dequantize) -> M:
    """Register a function that computes the matrix of a quantised linear layer faster than calling the layer does.

    Quantised layers with ``in_features`` and ``out_features`` are recognised without this. Their matrix is computed
    from the outputs for unit vectors, which costs as much as a batch of ``in_features`` rows.

    Args:
        cls: a class of quantised linear layers; subclasses are included.
        dequantize: returns the matrix (out, in) of a layer as a floating-point tensor. It is compared with the layer's
            output when a method is planned; a layer with another matrix is refused.

    Returns:
        ``cls``.

    Raises:
        TypeError: if ``cls`` is not a class of modules, or ``dequantize`` cannot be called.

    Example::

        lp.register_quantized(MyLinear, lambda layer: layer.codes.float() * layer.scale)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or not callable(dequantize):
        raise TypeError(f"register_quantized takes a subclass of nn.Module and a function, got {cls!r}, {dequantize!r}")
    _REGISTERED[cls] = dequantize
    return cls


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """Return (out, in) if ``module`` has the sizes of a linear layer; None otherwise."""
    for names in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        rows, columns = (getattr(module, name, None) for name in names)
        if isinstance(rows, int) and isinstance(columns, int):
            return rows, columns
    return None


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of ``module``, by name, without those of adapters."""
    for name, inside in base_modules(module):
        for tensors in (inside._parameters, inside._buffers):
            yield from ((f"{name}.{key}".lstrip("."), t) for key, t in tensors.items() if t is not None)


def is_packed(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer whose weight is not stored as a plain floating-point matrix."""
    sizes = linear_sizes(module)
    if sizes is None:
        return False
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) in (nn.Parameter, Tensor) and weight.dtype.itemsize > 1:
        return False  # the common case, without a look at the other tensors
    tensors = [t for _, t in own_tensors(module)]
    plain = [t for t in tensors if storage_problem(t) is None and t.ndim == 2]
    if any(tuple(t.shape) in (sizes, sizes[::-1]) for t in plain):
        return False
    stored = any(t.ndim > 1 and storage_problem(t) is not None for t in tensors)
    return stored or any(hasattr(m, "_packed_params") for _, m in base_modules(module))


def is_compressed(module: nn.Module) -> bool:
    """Whether compressed-tensors manages ``module``: its weight is packed until the model's first forward, then plain.

    It stays frozen, and it is saved with the scales of its original weight.
    """
    return hasattr(module, "quantization_scheme")


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield ``tensor`` with its name, or the plain tensors inside it if it is a tensor subclass of another library."""
    if is_traceable_wrapper_subclass(tensor) and storage_problem(tensor) is not None:
        for part in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def packed_layers(model: nn.Module) -> list[nn.Module]:
    """The packed layers of ``model``."""
    return [module for _, module in base_modules(model) if is_packed(module)]


def parameter_sizes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Map each parameter of ``module`` itself to (id, number of elements); the id is equal for tied parameters.

    A packed weight, which may be stored in several tensors or buffers, counts as the matrix that it stands for.
    """
    own = {name: (id(p), p.numel()) for name, p in module._parameters.items() if p is not None}
    if not is_packed(module):
        return own
    return {
        "weight": (id(module), math.prod(linear_sizes(module) or ())),
        **{n: s for n, s in own.items() if n == "bias"},
    }


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of the base; a packed weight counts as the matrix that it stands for."""
    return sum({key: size for _, m in base_modules(model) for key, size in parameter_sizes(m).values()}.values())


def packed_note(model: nn.Module) -> list[str]:
    """A sentence for the report on the packed layers of ``model`` and their size; empty if there are none."""
    layers = packed_layers(model)
    if not layers:
        return []
    kinds = ", ".join(sorted({original_class(layer).__name__ for layer in layers}))
    numbers = sum(math.prod(linear_sizes(layer) or ()) for layer in layers)
    stored = sum(map(size_in_bytes, layers))
    return [f"{len(layers)} layers have quantised weights ({kinds}): {numbers:,} parameters in {stored:,} bytes"]


def size_in_bytes(layer: nn.Module) -> int:
    """The bytes that ``layer`` stores for its weight and scales, without its bias and adapters."""
    return sum(
        part.nbytes
        for key, value in base_state_dict(layer).items()
        if isinstance(value, Tensor) and key != "bias"
        for _, part in plain_tensors(key, value)
    )


def packed_problem(module: nn.Module) -> str | None:
    """Return why adapters cannot work on the packed layer ``module``, as the end of a sentence; None if they can."""
    if module not in _PROBLEMS:
        problem = _try(module)
        registered = _registered(module)
        if problem is None and registered is not None and (error := _matrix_error(module, registered)) is not None:
            problem = f"the matrix that its registered dequantize returns is not the one that it computes with: {error}"
        _PROBLEMS[module] = problem
    return _PROBLEMS[module]


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """Return the matrix (out, in) that the packed layer ``module`` computes with, in a floating-point dtype.

    The fastest way whose result agrees with the layer's output is used: a registered function, the ``dequantize``
    method of the weight, the states of bitsandbytes, or the outputs for unit vectors.

    Raises:
        ValueError: if the layer does not compute a linear map.
    """
    if module not in _CHOSEN:
        if (problem := packed_problem(module)) is not None:
            raise ValueError(f"the weight of this {original_class(module).__name__} cannot be dequantised: {problem}")
        ways = [way for way in (_registered(module), _of_tensor, _of_bitsandbytes) if way is not None]
        _CHOSEN[module] = next((way for way in ways if _matrix_error(module, way) is None), _by_unit_vectors)
    return _CHOSEN[module](module)


def _registered(module: nn.Module) -> Dequantize | None:
    return next((_REGISTERED[c] for c in original_class(module).__mro__ if c in _REGISTERED), None)


def _of_tensor(module: nn.Module) -> Tensor:
    return module._parameters["weight"].dequantize()  # type: ignore[union-attr]


def _of_bitsandbytes(module: Any) -> Tensor:
    weight = module._parameters["weight"]
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # one scale per output, for values up to 127
    return weight.data * (scales / 127)[:, None]


def _by_unit_vectors(module: nn.Module, block: int = 256) -> Tensor:
    sizes = linear_sizes(module)
    assert sizes is not None
    rows, columns = sizes
    device, dtype = _device(module), _dtype(module)
    offset = _call(module, torch.zeros(1, columns, device=device, dtype=dtype))
    matrix = torch.empty(rows, columns, device=device, dtype=offset.dtype)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        unit = torch.zeros(stop - start, columns, device=device, dtype=dtype)
        unit[:, start:stop].fill_diagonal_(1)
        matrix[:, start:stop] = (_call(module, unit) - offset).t()
    return matrix


def _call(module: nn.Module, x: Tensor, training: bool = False) -> Tensor:
    """The output for ``x`` of the layer alone: without its bias, adapters and hooks. The layer is not changed."""
    cls: Any = original_class(module)
    twin = cls.__new__(cls)
    vars(twin).update(vars(module), training=training)
    keep_differentiable(twin)
    for tensors in ("_parameters", "_buffers"):
        own = vars(module)[tensors]
        vars(twin)[tensors] = {**own, "bias": None} if "bias" in own else dict(own)
    vars(twin)["_modules"] = {name: m for name, m in module._modules.items() if name != "adapters"}
    return cls.forward(twin, x)


def keep_differentiable(module: Any) -> None:
    """Keep a 4-bit layer of bitsandbytes in the form through which gradients flow.

    On CPUs with AVX512-BF16, its forward in evaluation mode repacks the weight for a kernel without a backward, and a
    later training step would get no gradient.
    """
    if getattr(module, "support_avx512bf16_for_cpu", False):
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # restores the original form
        module.support_avx512bf16_for_cpu = False


def _device(module: nn.Module) -> torch.device:
    return next((t.device for _, t in own_tensors(module)), torch.device("cpu"))


def _dtype(module: nn.Module) -> torch.dtype:
    """An input dtype that the layer accepts."""
    sizes = linear_sizes(module)
    assert sizes is not None
    own = [t.dtype for _, t in own_tensors(module) if t.is_floating_point() and t.dtype.itemsize > 1]
    error: Exception | None = None
    for dtype in dict.fromkeys([*own[:1], torch.float32, torch.bfloat16, torch.float16]):
        try:
            with torch.no_grad():
                _call(module, torch.zeros(1, sizes[1], device=_device(module), dtype=dtype))
            return dtype
        except Exception as e:  # the layer's own forward may raise anything
            error = error or e
    assert error is not None
    raise error


def _inputs(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Two batches (3, in) of numbers of both signs and several magnitudes."""
    sizes = linear_sizes(module)
    assert sizes is not None
    count = torch.arange(1, 6 * sizes[1] + 1, dtype=torch.float64, device="cpu")
    values = count.mul(0.7).sin_().add_(count.mul(0.37).cos_()).view(2, 3, sizes[1])
    magnitudes = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64, device="cpu").view(3, 1)
    x, z = (values * magnitudes).to(_device(module), _dtype(module))
    return x, z


def _error(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of two batches, by row."""
    a, b = a.detach().double(), b.detach().double()
    largest = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp_min(1e-30)
    error = ((a - b).norm(dim=-1) / largest).max()
    return float(error) if torch.isfinite(error) else float("inf")


@torch.no_grad()
def _matrix_error(module: nn.Module, way: Dequantize) -> str | None:
    try:
        x, _ = _inputs(module)
        matrix, y = way(module), _call(module, x) - _call(module, torch.zeros_like(x))
        if (
            not isinstance(matrix, Tensor)
            or not matrix.is_floating_point()
            or tuple(matrix.shape) != linear_sizes(module)
        ):
            return f"it is not a floating-point matrix of {'x'.join(map(str, linear_sizes(module) or ()))}"
        error = _error(x.double() @ matrix.double().t(), y)
    except Exception as e:  # another library's function
        return f"{type(e).__name__}: {e}"
    return None if error <= TOLERANCE else f"relative error {error:.2g}"


def _try(module: nn.Module) -> str | None:
    if any(t.is_meta for _, t in own_tensors(module)):
        return "it is on the meta device: load its weights first"
    with torch.random.fork_rng(devices=[]), torch.autocast(_device(module).type, enabled=False):
        try:
            return next(filter(None, (_linear_problem(module, training) for training in (True, False))), None)
        except Exception as error:  # the layer's own forward may raise anything
            what = " ".join(f"{type(error).__name__}: {error}".split())
            return f"its forward failed in a trial call ({what[:200]})"


def _linear_problem(module: nn.Module, training: bool) -> str | None:
    x, z = _inputs(module)
    sizes = linear_sizes(module)
    assert sizes is not None
    with torch.no_grad():
        offset = _call(module, torch.zeros_like(x), training)

        def product(v: Tensor) -> Tensor:
            return _call(module, v, training) - offset

        y, other = product(x), product(z)
        if tuple(y.shape) != (3, sizes[0]):
            return f"its output has {tuple(y.shape)[1:]} features instead of {sizes[0]}"
        wrong = max(_error(product(x + z), y + other), _error(product(-0.5 * x), -0.5 * y))
        if wrong > TOLERANCE:
            return f"it does not compute a linear map of its input (relative error {wrong:.2g})"
    # Own hooks, because those of a checkpoint around this call would recompute it in the backward here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        leaf = x.clone().requires_grad_()
        out = _call(module, leaf, training)
        if not out.requires_grad:
            return "no gradient flows through it, so nothing before it could be trained"
        weights = _inputs_like(out)
        (grad,) = torch.autograd.grad(out, leaf, weights)
    # For y = x W^T, the gradient g of sum(w y) satisfies g z = w (z W^T) for any z.
    with torch.no_grad():
        got, expected = (grad * z).double().sum(-1), (weights * other).double().sum(-1)
        scale = (weights.double().norm(dim=-1) * other.double().norm(dim=-1)).clamp_min(1e-30)
        if not bool(((got - expected).abs() / scale <= TOLERANCE).all()):
            return "its gradient is not that of a linear map"
    return None


def _inputs_like(y: Tensor) -> Tensor:
    return torch.arange(1, y.numel() + 1, dtype=torch.float64, device="cpu").mul_(1.3).cos_().view(y.shape).to(y)
