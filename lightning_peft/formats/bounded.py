"""A limit on what a file can make this process allocate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.formats.strict_json import FormatError

__all__ = ["Bounded"]


class Bounded(TorchDispatchMode):
    """While it is entered, a new tensor that is far larger than all in the model and the file is an error.

    Args:
        model: what the adapter is for.
        tensors: the file's, whose configuration says how large they are before they are compared.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        known = (*model.parameters(), *(t for t in tensors.values() if isinstance(t, Tensor)))
        self.most = 4 * max((t.numel() for t in known), default=0) + 2**20

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and not isinstance(args[0], Tensor):  # it makes one
            sizes = [math.prod(arg) if _is_size(arg) else arg for arg in args]
            wanted = max((size for size in sizes if isinstance(size, int)), default=0)
            if wanted > self.most:
                raise FormatError(
                    f"the configuration asks for a tensor of {wanted:,} values, which neither the file nor the model "
                    "comes near"
                )
        return func(*args, **(kwargs or {}))


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(side, int) for side in value)
