"""Watch the first training batch, to find the calls of frozen modules whose results depend on the data alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.core.adapters.stack import Adapted
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.module_io import tensors_in
from lightning_peft.core.names import listed
from lightning_peft.trainer.resume.rng_state import rng_state

__all__ = ["Call", "CannotCache", "FirstBatch", "Slot", "with_slots"]

_PLAIN = (Tensor, str, int, float, bool, type(None), torch.dtype, torch.device)
_LEAVING_TORCH = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.data_ptr,
}  # ways to read a tensor that do not appear as an operation


class CannotCache(MisconfigurationException):
    """The output of the frozen part, or the data, is not the same in every epoch."""

    def __init__(self, why: str) -> None:
        super().__init__(f"CacheFrozen: {why}")
        self.why = why


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in the output of a call.

    Attributes:
        position: among the tensors of the output.
        dtype: of the tensor.
        ndim: its number of dimensions; the first dimension holds the rows.
    """

    position: int
    dtype: torch.dtype
    ndim: int


@dataclass(eq=False)
class Call:
    """One call of a frozen module.

    Attributes:
        module: the qualified name of the module.
        index: how many calls of this module came before in the batch.
        output: its output, with a :class:`Slot` in place of each tensor.
        tensors: the tensors of its output in the first batch, with their version counters.
        used: the positions of the tensors that something other than a skipped call reads.
        obstacle: the reason why the call cannot be skipped; None if it can.
    """

    module: str
    index: int
    output: Any = None
    tensors: list[tuple[Tensor, int]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    obstacle: str | None = None


def with_slots(output: Any) -> tuple[Any, list[Tensor]]:
    """Return ``output`` with a :class:`Slot` in place of each tensor, and the tensors."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> Slot:
        tensors.append(tensor)
        return Slot(len(tensors) - 1, tensor.dtype, tensor.ndim)

    return apply_to_collection(output, Tensor, take), tensors


class FirstBatch(TorchDispatchMode):
    """A context around one training step. Afterwards, :meth:`skippable` returns the calls that can be skipped.

    A call can be skipped if it ends before a module with parameters that train starts, and before any operation reads a
    tensor that requires a gradient: until then, nothing that trains has had an effect. The output of a skipped call
    must be stored only if something other than a skipped call reads it. Operations are watched below autograd, where
    those of custom functions are visible too.

    Args:
        model: the module that trains.
        rows: the number of rows in the batch.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__()
        self._model, self._rows = model, rows
        self.counts: dict[str, int] = {}  #: how often each frozen module was called, other than by a frozen module
        self._calls: list[Call] = []  # those that ended before the cut
        self._running: Call | None = None  # the outermost frozen module that runs now
        self._made: dict[int, tuple[Call, int]] = {}  # by id; the calls keep the tensors alive, so ids are not reused
        self._reads: list[
            tuple[Call, int, Call | None]
        ] = []  # (call, position of a tensor in its output, call that reads it)
        self._cut = False
        self._random = _rng_digest()
        self._handles: list[Any] = []
        self._leaving = _LeavingTorch(self._read)

    def __enter__(self) -> FirstBatch:
        for name, module in self._model.named_modules():
            parameters = list(module.parameters())
            trains = any(p.requires_grad for p in parameters)
            if name and parameters and not trains:
                self._handles += self._watch(name, module)
            # An adapter's dropout draws random numbers before any operation reads a parameter that trains.
            elif trains and (has_mixin(module, Adapted) or any(p.requires_grad for p in module.parameters(False))):
                self._handles.append(module.register_forward_pre_hook(lambda *_: self._cut_here()))
        self._leaving.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._leaving.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            self._read(tensor)
            if tensor.requires_grad:
                self._cut_here()
        return func(*args, **(kwargs or {}))

    def skippable(self) -> list[Call]:
        """Return the calls that can be skipped, in their order.

        Raises:
            CannotCache: if there are none.
        """
        skipped = {call for call in self._calls if call.obstacle is None}
        if not skipped and self._calls:
            obstacles = [f"{call.module!r} {call.obstacle}" for call in self._calls]
            raise CannotCache(f"no call of a frozen module can be skipped: {listed(obstacles)}")
        if not skipped:
            raise CannotCache(
                "something that trains runs before the first frozen module ends, so no part of the model is the same "
                "in each epoch. CacheFrozen helps where the lower layers are frozen and have no adapters: with "
                "LinearProbe or LastLayers, or with a method whose targets are in the last layers"
            )
        for call, position, reader in self._reads:
            if reader not in skipped:
                call.used.add(position)
        return [call for call in self._calls if call in skipped]

    def _watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        running: list[tuple[Call, list[int], list[tuple[Tensor, int]]]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._running is not None:
                return
            call = self._running = Call(name, self.counts.get(name, 0))
            self.counts[name] = call.index + 1
            for tensor in tensors_in((args, kwargs)):
                self._read(tensor)
            for odd in _objects((args, kwargs)):
                call.obstacle = _may_change(odd)
            if not self._cut:
                self._check_random("code outside of frozen modules")
            inputs = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs)) if not tensor.is_inference()]
            running.append((call, _versions(module), inputs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not running or running[-1][0] is not self._running:
                return
            call, versions, inputs = running.pop()
            self._running = None
            if not self._cut:
                self._check_random(repr(name), module)
                if _versions(module) != versions:
                    raise CannotCache(
                        f"{name!r} changes its own buffers in each step (batch norm in training mode?), so its output "
                        "is not the same in each epoch: call .eval() on it before the fit"
                    )
                if any(tensor._version != version for tensor, version in inputs):
                    call.obstacle = "changes its input in place"
                self._ended(call, output)

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _cut_here(self) -> None:
        if not self._cut:
            self._check_random("code outside of frozen modules")
            self._cut = True

    def _ended(self, call: Call, output: Any) -> None:
        self._calls.append(call)
        for odd in _objects(output):
            call.obstacle = f"returns a {type(odd).__name__}"
            return
        call.output, tensors = with_slots(output)
        call.tensors = [(tensor, tensor._version) for tensor in tensors]
        for position, tensor in enumerate(tensors):
            self._made[id(tensor)] = call, position
            if tensor.ndim == 0 or len(tensor) != self._rows:
                call.obstacle = f"returns a tensor of {tuple(tensor.shape)} for {self._rows} rows"

    def _read(self, tensor: Tensor) -> None:
        made = self._made.get(id(tensor))
        if made is not None:
            self._reads.append((made[0], made[1], self._running))

    def _check_random(self, where: str, module: nn.Module | None = None) -> None:
        if _rng_digest() == self._random:
            return
        active = [] if module is None else _active_dropout(module)
        raise CannotCache(
            f"{where} draws random numbers{f' ({listed(active)})' if active else ''} before anything that trains runs, "
            "so the frozen part is not the same in each epoch: call .eval() on the frozen modules, or set their "
            "dropout to 0"
        )


class _LeavingTorch(TorchFunctionMode):
    """Reports the tensors that are read as numbers, which is not an operation."""

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVING_TORCH:
            self._read(args[0])
        return func(*args, **(kwargs or {}))


def _objects(value: Any) -> Iterator[Any]:
    """Yield each object that is neither a tensor nor a plain value, nor a collection of these."""
    if hasattr(value, "keys"):
        for part in value.values():
            yield from _objects(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _objects(part)
    elif not isinstance(value, _PLAIN):
        yield value


def _may_change(value: object) -> str:
    hint = " (set model.config.use_cache = False)" if "Cache" in type(value).__name__ else ""
    return f"gets a {type(value).__name__}, which it may change{hint}"


def _versions(module: nn.Module) -> list[int]:
    return [t._version for t in (*module.parameters(), *module.buffers()) if not t.is_inference()]


def _active_dropout(module: nn.Module) -> list[str]:
    found = ((name, part) for name, part in module.named_modules() if part.training)
    return [f"{name} p={p:g}" for name, part in found if isinstance(p := getattr(part, "p", None), float) and p > 0]


def _rng_digest() -> str:
    state = rng_state()
    digest = hashlib.blake2b(repr((state["python"], state["numpy"][2:])).encode(), digest_size=16)
    for part in (state["torch"], state["numpy"][1], state.get("cuda", torch.empty(0))):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
