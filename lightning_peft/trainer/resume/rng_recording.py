"""Record and repeat the random numbers that a dataloader draws, from global RNGs and from those of its samplers and
dataset.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from lightning_peft.trainer.resume.rng_state import rng_state, set_rng_state

__all__ = ["CollateWithRNGState", "RNGStates", "RecordedDraws", "StartWorker"]


class RNGStates:
    """Reads and sets the global CPU RNGs and the generators that some objects hold.

    Args:
        holders: Loaders, samplers and datasets. Their attributes are searched for generators (torch's, numpy's,
            Python's), and so are the attributes of the samplers and datasets that they hold.
    """

    def __init__(self, *holders: Any) -> None:
        self._own = _generators(*holders)

    @property
    def has_own(self) -> bool:
        """Whether any of the objects holds a generator."""
        return bool(self._own)

    def state(self) -> dict[str, Any]:
        """All RNG states by name, as tensors and plain values; ``"generators"`` lists those of the held generators."""
        return {**rng_state(cuda=False), "generators": [_state(g) for g in self._own]}

    def set(self, state: dict[str, Any]) -> None:
        """Set the RNGs that ``state`` names; the others are unchanged."""
        set_rng_state({name: value for name, value in state.items() if name != "cuda"})
        for generator, value in zip(self._own, state.get("generators", ())):
            _set_state(generator, value)


def _same(a: Any, b: Any) -> bool:
    """Whether two states of the same RNG are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and not (a and isinstance(a[0], int)):  # a list of numbers is compared at once, below
        return all(map(_same, a, b))
    return bool(a == b)


class RecordedDraws:
    """An iterator that records the RNG states before each of its draws, or repeats draws from a record.

    Args:
        items: The iterator to wrap.
        rng_states: The RNGs that ``items`` may draw from.
        log: Item index -> RNG states before that item, for items that draw. A state that equals the one after the
            previous draw is omitted. Extended in place.
        until: Items below this index are repeated: they are drawn with the RNG states in ``log``, and the current
            states are put back afterwards.
        count: Index of the first item.
        when: Returns whether the item at an index is recorded; by default every item is.
        window: Keep only the last two items in ``log``, each with all of its states.
    """

    def __init__(
        self,
        items: Iterator[Any],
        rng_states: RNGStates,
        log: dict[int, dict[str, Any]],
        until: int = 0,
        count: int = 0,
        when: Callable[[int], bool] | None = None,
        window: bool = False,
    ) -> None:
        self.items, self.rng_states, self.log, self.until, self.count = items, rng_states, log, until, count
        self.when, self.window = when, window
        self.left: dict[str, Any] | None = None  # the RNG states after the last item that drew from them

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.count < self.until and (self.left is not None or self.count in self.log):
            item = self._repeat()
        elif self.when is None or self.when(self.count):
            item = self._record()
        else:
            item = next(self.items)
        self.count += 1
        return item

    def _repeat(self) -> Any:
        # Training has drawn from the same global RNGs since the first run drew this item, so the current states must
        # be kept apart from those of the repeated draw.
        now = self.rng_states.state()
        self.rng_states.set({**(self.left or {}), **self.log.get(self.count, {})})
        try:
            return next(self.items)
        finally:
            self.left = self.rng_states.state()
            self.rng_states.set(now)

    def _record(self) -> Any:
        before = self.rng_states.state()
        item = next(self.items)
        after = self.rng_states.state()
        drew = {name: state for name, state in before.items() if not _same(state, after[name])}
        left = self.left or {}
        # States are large (5 kB for torch). A state that has not changed since the last draw need not be stored again.
        entry = {n: s for n, s in drew.items() if self.window or n not in left or not _same(s, left[n])}
        self.left = {**left, **{name: after[name] for name in drew}}
        if entry:
            self.log[self.count] = entry
        if self.window:
            self.log.pop(self.count - 2, None)
        return item


class CollateWithRNGState:
    """A ``collate_fn`` for workers that returns the batch and the worker's RNG states after it."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.rng_states: RNGStates | None = None

    def __call__(self, samples: Any) -> Any:
        if self.rng_states is None:
            self.rng_states = RNGStates(get_worker_info().dataset)  # type: ignore[union-attr]
        return self.collate(samples), self.rng_states.state()


class StartWorker:
    """A ``worker_init_fn`` that calls the user's own and then sets the worker's RNG states."""

    def __init__(self, init: Callable[[int], None] | None, states: dict[int, Any]) -> None:
        self.init = init
        self.states = states

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        if worker in self.states:
            RNGStates(get_worker_info().dataset).set(self.states[worker])  # type: ignore[union-attr]


def _generators(*holders: Any) -> list[Any]:
    import numpy as np

    kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    found: dict[int, Any] = {}
    queue, seen = list(holders), set(map(id, holders))
    for holder in queue:
        for value in getattr(holder, "__dict__", {}).values():
            if isinstance(value, kinds):
                found.setdefault(id(value), value)
            elif isinstance(value, Sampler | Dataset) and id(value) not in seen:
                seen.add(id(value))
                queue.append(value)
    return list(found.values())


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, state, gauss = generator.getstate()
        return [version, list(state), gauss]
    holder = generator.bit_generator if hasattr(generator, "bit_generator") else generator
    return _plain(holder.state if hasattr(holder, "state") else holder.get_state(legacy=False))


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _arrays(state)
    else:
        generator.set_state(_arrays(state))


def _plain(state: Any) -> Any:
    """numpy's generator state with tensors in place of arrays, so that a checkpoint loads with weights_only=True."""
    import numpy as np

    if isinstance(state, dict):
        return {k: _plain(v) for k, v in state.items()}
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.view(f"int{8 * state.itemsize}").copy())
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: _arrays(v) for k, v in state.items()}
    if isinstance(state, torch.Tensor):
        array = state.cpu().numpy()
        return array.view(f"uint{8 * array.itemsize}")
    return state
