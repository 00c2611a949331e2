"""Last layers: the last blocks of the base and everything after them train.

    theta_l trains for l > L - n,    theta_l is frozen otherwise

It trains the parameters of the last n of L blocks, of the layers after them (final norm, pooler) and of the head. The
backward pass ends at the lowest block that trains, which saves both time and memory.

Yosinski et al. 2014, "How transferable are features in deep neural networks?", arXiv:1411.1792;
Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv:1911.03090.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field
from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.arguments import optional, positive_int
from lightning_peft.methods.families.selection import SelectionMethod, tail_modules

__all__ = ["LastLayers"]


class LastLayers(SelectionMethod):
    """Trains the last blocks and the head, and freezes everything before them (arXiv:1411.1792).

    Choose it when the task needs new high-level features but can reuse the low-level ones, and training time matters:
    the backward pass ends at the lowest block that trains. It costs optimizer state and checkpoint space for entire
    blocks, more than adapters in every block need.

    Args:
        n: number of blocks to train, counted from the output; None means 1, or all blocks that ``targets`` names.
        targets: ``"blocks"`` (the repeated blocks found in the model), or patterns of modules to use as blocks.
        exclude: patterns of modules inside the blocks that stay frozen.
        trainable, name: see :class:`lightning_peft.PEFTMethod`. The layers after the last block always train.
        layer_decay: multiply the learning rate by this factor for each block further from the output.

    Raises:
        ValueError: if n is below 1, or layer_decay is outside (0, 1].
        TargetError: if the model has fewer than n blocks, or a pattern matches nothing.

    Example::

        trainer = L.Trainer(callbacks=[lp.LastLayers(n=2, layer_decay=0.8)])
    """

    parameter_count = "the last n blocks and everything after them"

    n: int | None = field(default=None, validator=optional(positive_int), kw_only=False)
    targets: str | Sequence[str] = field(default="blocks", kw_only=False)

    def choose(self, model: nn.Module, plan: Plan) -> None:
        blocks = self.blocks(model)
        n = self.n if self.n is not None else len(blocks) if self.patterns("blocks") else 1
        if n > len(blocks):
            raise TargetError(
                f"n={n}, but {original_class(model).__name__} has {len(blocks)} blocks "
                f"({blocks[0] if blocks else 'none'} ...): lower n, or name what to train in targets"
            )
        self.add_modules(model, [*blocks[len(blocks) - n :], *tail_modules(model)], plan)
