"""Present a stored weight as a matrix W (out x in), and apply a low-rank pair the way its layer applies W.

Methods only see matrices: convolutions, embeddings and transposed storage are handled here and nowhere else.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class, own_forward
from lightning_peft.core.names import join
from lightning_peft.core.targeting.linear_like import linear_form, registered_form
from lightning_peft.core.targeting.packed import is_packed

__all__ = [
    "ConvLayout",
    "ConvTransposeLayout",
    "EmbeddingLayout",
    "LinearLayout",
    "NormLayout",
    "OtherLinearLayout",
    "OtherTransposedLayout",
    "PackedLayout",
    "TransposedLayout",
    "WeightLayout",
    "layout_of",
    "weight_name",
]


class WeightLayout:
    """A weight that is stored as a matrix and that its module reads directly, so there is no activation path."""

    #: whether :meth:`down` and :meth:`up` can compute the low-rank update from the layer's input
    has_activation = False
    #: whether the layer takes vectors (..., in) and returns vectors (..., out)
    vectors = False

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as a matrix (..., out, in); a view if possible."""
        return weight

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: ``matrix`` in the stored shape of ``like``."""
        return matrix

    def down(self, host: Any, x: Tensor, a: Tensor) -> Tensor:
        """Run the layer's operation on ``x`` with the matrix ``a`` (r x in) as its weight."""
        raise NotImplementedError

    def up(self, host: Any, h: Tensor, b: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return ``y`` plus ``scale`` times the matrix ``b`` (out x r) applied to ``h``."""
        raise NotImplementedError

    def features(self, host: Any, v: Tensor) -> Tensor:
        """Reshape ``v``, one value per input or output feature, so that it broadcasts over the layer's activations."""
        raise NotImplementedError

    def inputs(self, host: Any, matrix: torch.Size) -> tuple[int, int]:
        """Return (input features, groups); the matrix has ``features / groups * kernel`` columns."""
        return matrix[-1], 1

    def kernel(self, weight: Tensor) -> torch.Size:
        """The kernel size if the matrix has ``in * kernel`` columns; empty for layers without a kernel."""
        return torch.Size()


class LinearLayout(WeightLayout):
    """``nn.Linear``: the weight is W itself."""

    has_activation = True
    vectors = True

    def down(self, host: Any, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, _cast(a, x))

    def up(self, host: Any, h: Tensor, b: Tensor, y: Tensor, scale: float) -> Tensor:
        # One fused operation avoids a scaled copy of the activations and a separate sum.
        b = _cast(b, y)
        out = torch.addmm(y.reshape(-1, y.shape[-1]), _cast(h, y).reshape(-1, h.shape[-1]), b.t(), alpha=scale)
        return out.view(y.shape)

    def features(self, host: Any, v: Tensor) -> Tensor:
        return v


class TransposedLayout(LinearLayout):
    """Hugging Face's ``Conv1D`` (GPT-2): the weight is stored as W^T."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t()


class OtherLinearLayout(LinearLayout):
    """A linear layer of a class other than ``nn.Linear`` that stores W."""


class OtherTransposedLayout(TransposedLayout):
    """A linear layer of a class other than ``nn.Linear`` that stores W^T."""


class PackedLayout(LinearLayout):
    """A linear layer with a quantised or packed weight: methods see the dequantised W."""


def weight_name(host: str, parameter: str, bare: bool) -> str:
    """Return the name of a weight in patterns and files: its layer's name, or the parameter's if there is no layer.

    Args:
        host: the name of the module that carries the adapter.
        parameter: the weight's name in that module.
        bare: whether the weight is a parameter of a module that is not a known kind of layer.
    """
    full = join(host, parameter)
    return full if bare and parameter == "weight" else full.removesuffix(".weight")


class NormLayout(WeightLayout):
    """A norm layer's weight, one value per feature, as a matrix with one column."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)


class EmbeddingLayout(LinearLayout):
    """``nn.Embedding``: a linear layer (dim x vocabulary) on one-hot vectors, with its weight stored transposed."""

    vectors = False

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t()

    def down(self, host: Any, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.t(), padding_idx=host.padding_idx)


class ConvLayout(WeightLayout):
    """``nn.Conv1d/2d/3d`` with any stride, dilation, groups and padding mode: W is (out x in/groups * kernel)."""

    has_activation = True

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def down(self, host: Any, x: Tensor, a: Tensor) -> Tensor:
        # W = BA uses the same A for every group, so A is repeated, and h has r channels per group.
        kernel = _cast(a, x).view(-1, host.in_channels // host.groups, *host.kernel_size)
        if host.groups > 1:
            kernel = kernel.repeat(host.groups, *[1] * (kernel.ndim - 1))
        padding = host.padding
        if host.padding_mode != "zeros":
            x = F.pad(x, host._reversed_padding_repeated_twice, mode=host.padding_mode)
            padding = 0
        conv = _CONV[len(host.kernel_size)]
        return conv(x, kernel, None, host.stride, padding, host.dilation, host.groups)

    def up(self, host: Any, h: Tensor, b: Tensor, y: Tensor, scale: float) -> Tensor:
        b, h = _cast(b, y), _cast(h, y)
        if host.groups == 1 and y.is_contiguous() and y.ndim > len(host.kernel_size) + 1:
            # A 1x1 convolution is a product for each image; as such it adds to y in one operation.
            out = torch.baddbmm(y.flatten(2), b.expand(len(y), *b.shape), h.flatten(2), alpha=scale)
            return out.view(y.shape)
        kernel = b.view(*b.shape, *[1] * len(host.kernel_size))
        return torch.add(y, _CONV[len(host.kernel_size)](h, kernel, groups=host.groups), alpha=scale)

    def features(self, host: Any, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(host.kernel_size))

    def kernel(self, weight: Tensor) -> torch.Size:
        return weight.shape[2:]

    def inputs(self, host: Any, matrix: torch.Size) -> tuple[int, int]:
        return host.in_channels, host.groups


class ConvTransposeLayout(ConvLayout):
    """``nn.ConvTranspose1d/2d/3d``, stored (in x out/groups x kernel): W is (out x in/groups * kernel).

    Any stride, padding, output padding, dilation and groups; calls with ``output_size`` too.
    """

    def __init__(self, groups: int = 1) -> None:
        self.groups = groups

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        inputs, outputs, *kernel = like.shape
        return matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel).transpose(1, 2).reshape(like.shape)

    def down(self, host: Any, x: Tensor, a: Tensor) -> Tensor:
        kernel = _cast(a, x).view(len(a), -1, *host.kernel_size).transpose(0, 1)
        if host.groups > 1:
            kernel = kernel.repeat(host.groups, *[1] * (kernel.ndim - 1))
        # The output size of a call is known only in ``up``: compute the largest here, and cut it there.
        largest = [max(sizes) - 1 for sizes in zip(host.stride, host.dilation)]
        conv = _CONV_TRANSPOSE[len(host.kernel_size)]
        return conv(x, kernel, None, host.stride, host.padding, largest, host.groups, host.dilation)

    def up(self, host: Any, h: Tensor, b: Tensor, y: Tensor, scale: float) -> Tensor:
        for dim in range(-len(host.kernel_size), 0):
            h = h.narrow(dim, 0, y.shape[dim])
        return super().up(host, h, b, y, scale)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _cast(t: Tensor, like: Tensor) -> Tensor:
    """Cast an adapter's float32 tensor to the activation's dtype, unless autocast does it."""
    if t.dtype == like.dtype or torch.is_autocast_enabled(like.device.type):
        return t
    return t.to(like.dtype)


_FORWARDS: dict[type[nn.Module], type[WeightLayout]] = {
    nn.Linear: LinearLayout,
    nn.Conv1d: ConvLayout,
    nn.Conv2d: ConvLayout,
    nn.Conv3d: ConvLayout,
    nn.ConvTranspose1d: ConvTransposeLayout,
    nn.ConvTranspose2d: ConvTransposeLayout,
    nn.ConvTranspose3d: ConvTransposeLayout,
}


def layout_of(module: nn.Module) -> tuple[WeightLayout, bool] | None:
    """Return the layout of the module's ``weight`` and whether ``all-linear`` includes it; None for other modules."""
    cls = original_class(module)
    if is_packed(module):
        return PackedLayout(), True
    for kind, made in _FORWARDS.items():
        if isinstance(module, kind):
            layout = ConvTransposeLayout(cast(int, module.groups)) if made is ConvTransposeLayout else made()
            return _guarded(layout, module, kind), kind is nn.Linear
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return None
        return _guarded(EmbeddingLayout(), module, nn.Embedding), False
    if any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in cls.__mro__):
        return _guarded(TransposedLayout(), module, cls), True
    return _other_linear(module)


def _other_linear(module: nn.Module) -> tuple[WeightLayout, bool] | None:
    """The layout of a linear layer of a class that torch does not know; None for other modules."""
    computed, registered = linear_form(module), registered_form(module)
    form = registered or computed
    # If it is not registered, a layer that computes x @ weight has a bare parameter that is adapted as stored: existing
    # adapters have those shapes.
    if form is None or (form == "transposed" and registered is None):
        return None
    layout = OtherTransposedLayout() if form == "transposed" else OtherLinearLayout()
    if computed != form:  # registered, and its forward does more: it runs with the adapted weight in place
        layout.has_activation = layout.vectors = False
    return layout, True


def _guarded(layout: WeightLayout, module: nn.Module, kind: Any) -> WeightLayout:
    """Turn off the activation path if the module computes something different from the layer it derives from.

    Such a layer (a scaled embedding, for example) runs with the adapted weight in place instead, which is correct for
    any forward that reads ``self.weight``.
    """
    cls: Any = original_class(module)
    own_conv = getattr(cls, "_conv_forward", None) is not getattr(kind, "_conv_forward", None)
    same_class = cls.forward is kind.forward or (kind is nn.Linear and _is_product(module, cls))
    if not same_class or own_conv or not _computes_as(module, kind, layout):
        layout.has_activation = layout.vectors = False
    return layout


@torch.no_grad()
def _is_product(module: nn.Module, cls: Any) -> bool:
    """Whether a subclass of Linear with its own forward still computes a plain linear product, as Falcon's does.

    The check runs a small copy of the layer in train and eval mode on inputs of several magnitudes, so a forward that
    clips, scales, masks or adds noise is detected. A layer with state other than a weight and a bias returns False.
    """
    state = {key: value for key, value in vars(module).items() if key not in ("forward", "_own_forward")}
    children = [name for name in module._modules if name != "adapters"]
    if children or module._buffers or not module._parameters.keys() <= {"weight", "bias"}:
        return False
    weight = torch.linspace(-1, 2, 12).view(3, 4).sin()
    bias = None if module._parameters.get("bias") is None else torch.linspace(-2, 1, 3)
    x = torch.linspace(-1, 2, 12).view(3, 1, 4).cos() * torch.tensor([1e-2, 1.0, 1e3]).view(3, 1, 1)
    probe = cls.__new__(cls)
    vars(probe).update(state, in_features=4, out_features=3, _modules={})
    vars(probe)["_parameters"] = {
        name: None if t is None else nn.Parameter(t) for name, t in (("weight", weight), ("bias", bias))
    }
    expected = F.linear(x, weight, bias)
    with torch.random.fork_rng(devices=[]):
        for vars(probe)["training"] in (True, False):
            try:
                got = cls.forward(probe, x)
            except Exception:  # the user's forward may raise anything on this input
                return False
            if not isinstance(got, Tensor) or got.shape != expected.shape or not torch.allclose(got, expected):
                return False
    return True


@torch.no_grad()
def _computes_as(module: nn.Module, kind: Any, layout: WeightLayout) -> bool:
    """Whether a ``forward`` set on the instance returns the same as that of the class, as a wrapper around it does."""
    own = own_forward(module)
    if own is None:
        return True
    if not layout.vectors:
        return False
    try:
        weight = cast(Tensor, module.weight)
        x = torch.linspace(-1, 1, 2 * layout.matrix(weight).shape[-1]).view(2, -1).to(weight)
        return torch.equal(own(x), kind.forward(module, x))
    except (RuntimeError, TypeError, ValueError):  # on the meta device, or with a different signature
        return False
