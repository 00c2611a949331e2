"""AdapterDrop: skip the adapters of some blocks at inference.

Adapters in the first blocks contribute little, so skipping them saves time at a small cost in quality.
Rücklé et al. 2021, "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv:2010.11918.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.adapters.lookup import check_known, check_unmerged, stacks
from lightning_peft.core.adapters.switches import switched
from lightning_peft.core.names import is_within
from lightning_peft.core.targeting.blocks import find_blocks

__all__ = ["adapter_drop"]


@contextmanager
def adapter_drop(model: nn.Module, blocks: int | Sequence[int], name: str | None = None) -> Iterator[tuple[str, ...]]:
    """Inside the context, the adapters in some blocks do not run, for the thread or task that entered it.

    Args:
        model: an adapted model.
        blocks: the number of blocks to skip from the first, or a list of positions. Positions start at 0 in definition
            order (an encoder's blocks before its decoder's); negative ones count from the last block.
        name: skip only this adapter; by default, all adapters.

    Yields:
        The names of the modules whose adapters are skipped.

    Raises:
        ValueError: if the model does not have that many blocks, none of them has such an adapter, or adapters are
            merged into the base.

    Example::

        with lp.adapter_drop(model, 5):  # the first five layers run as in the base
            model.generate(**inputs)
    """
    found = [block for block, _ in find_blocks(model)]
    positions = range(blocks) if isinstance(blocks, int) else blocks
    if any(not -len(found) <= i < len(found) for i in positions) or (isinstance(blocks, int) and blocks < 0):
        raise ValueError(f"blocks={blocks!r}: the model has {len(found)} blocks ({', '.join(found[:3])}, ...)")
    if name is not None:
        check_known(model, name)
    chosen = tuple(found[i] for i in positions)
    left_out = {
        host: stack
        for host, stack in stacks(model).items()
        if is_within(host, *chosen) and (name is None or name in stack)
    }
    if chosen and not left_out:
        raise ValueError(f"no adapters to skip in {', '.join(chosen)}; adapters are in {list(stacks(model))}")
    check_unmerged(model)
    skipped = {stack: (*stack.skipped, *(stack if name is None else (name,))) for stack in left_out.values()}
    with switched({stack: {"skipped": names} for stack, names in skipped.items()}):
        yield tuple(left_out)
