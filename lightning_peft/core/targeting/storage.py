"""Detect weights that are quantised, packed or otherwise encoded, which methods cannot change."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["is_encoded_layer", "storage_problem"]


def storage_problem(tensor: Tensor) -> str | None:
    """Return why ``tensor`` cannot be read as a matrix of numbers, as the end of a sentence; None if it can."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"is stored as {tensor.dtype}, which is quantised or packed"
    if tensor.dtype.itemsize == 1:
        return f"is stored as {tensor.dtype}, which is quantised"
    kind = type(tensor)
    # torch's own subclasses (parameters, buffers, sharded tensors) hold plain numbers.
    if not isinstance(tensor, Tensor) or kind.__module__.partition(".")[0] == "torch":
        return None
    return f"is a {kind.__module__}.{kind.__name__}, a tensor subclass that may hold quantised values"


def is_encoded_layer(module: nn.Module) -> bool:
    """Whether ``module`` is another library's linear layer with a quantised or packed weight."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes):
        return False
    if any(p.ndim > 1 and (p.is_floating_point() or p.is_complex()) for p in module.parameters()):
        return False
    tensors = [*module.parameters(), *module.buffers()]
    packed = any(hasattr(m, "_packed_params") for m in module.modules())
    return packed or any(t.ndim > 1 and not t.is_floating_point() for t in tensors)
