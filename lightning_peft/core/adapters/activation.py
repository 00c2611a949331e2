"""The base class of adapters that change a module's output.

An adapter gets the module's input and its output. The output may be a tensor, or a tuple or mapping (including Hugging
Face's ``ModelOutput``) whose first tensor is the hidden state; the other entries are returned unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter, derive_flags
from lightning_peft.core.batching.batched import BatchedAdapters, BatchedPassthrough, PerGroupOutput
from lightning_peft.core.module_io import first_tensor, hidden_state, with_hidden_state
from lightning_peft.core.targeting.activation_sites import ActivationSite

__all__ = ["ActivationAdapter", "InputCapture"]


class ActivationAdapter(Adapter):
    """An adapter that is a function of activations. Subclasses implement :meth:`forward`.

    Args:
        site: where it attaches, with the number of features (``site.width``) and their dimension (``site.axis``).

    Example::

        class GateAdapter(lp.ActivationAdapter):
            def __init__(self, site):
                super().__init__(site)
                self.gate = nn.Parameter(torch.ones(site.width))

            def forward(self, x, y):
                return y * self.gate

        class Gate(lp.ActivationMethod):
            def build(self, site):
                return GateAdapter(site)

        lp.apply(model, Gate(targets=["v_proj"]))
    """

    #: True if ``x`` must be the sub-layer's input even when a module other than the host receives it
    reads_input = False

    #: whether :meth:`run` is the module's forward followed by :meth:`after`
    run_is_forward_and_after: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        derive_flags(cls, {"run_is_forward_and_after": {"run": False}, "neutral": {"forward": None, "after": None}})

    def __init__(self, site: ActivationSite) -> None:
        super().__init__()
        self.site_name = site.name
        self.width = site.width
        self.axis = site.axis
        self.captures: tuple[InputCapture, ...] = ()  # a tuple, because a module attribute would become a child

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output, in the shape of ``y``, given the input ``x`` and the output ``y`` so far."""
        raise NotImplementedError

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        y, x = hidden_state(output, self.site_name), self.reads(args, kwargs)
        return with_hidden_state(output, self.after(host, y if x is None else x, y))

    def reads(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the sub-layer's input for a call of the host; None if there is none."""
        return self.captures[0].take() if self.captures else first_tensor(args, kwargs)

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output of some rows, given their input and their output so far."""
        if y.shape[self.axis] != self.width:
            raise ValueError(
                f"{self.site_name!r} returned an output of shape {tuple(y.shape)}, but dimension {self.axis} was "
                f"expected to hold {self.width} features: set width= (and channels_first=) to match the output"
            )
        return self(x, y)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        return PerGroupOutput if self.run_is_forward_and_after else None


class InputCapture(Adapter):
    """Captures its host's input for the adapter at the end of the sub-layer. It has no parameters."""

    is_passthrough = True

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader
        self._runs = threading.local()

    @property
    def captured(self) -> Tensor | None:
        """The input captured in this thread; None after :meth:`take`."""
        return getattr(self._runs, "captured", None)

    @captured.setter
    def captured(self, x: Tensor | None) -> None:
        self._runs.captured = x

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.captured = first_tensor(args, kwargs)
        return call(*args, **kwargs)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters]:
        return BatchedPassthrough

    def take(self) -> Tensor:
        """Return the captured input and forget it, so that a later run cannot read an old input by mistake."""
        x, self.captured = self.captured, None
        if x is None:
            raise RuntimeError(
                f"the adapter on {self.reader!r} has no input: the module ran before the one whose input the adapter "
                "reads. Exclude it"
            )
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_runs"}  # thread-local: cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._runs = threading.local()

    def extra_repr(self) -> str:
        return f"read by {self.reader}"
