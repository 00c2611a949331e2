"""Last layers: the top blocks of the base and all after them train.

    theta_l' = theta_l after training for l > L - n,    theta_l' = theta_l otherwise

Trains the parameters of the last n of L blocks, of what follows them (final norm, pooler) and of the head. No
gradient flows below the lowest block that trains, so a step is cheaper in time as well as in memory.

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
    """Training of the last blocks and the head, with everything below frozen.

    Choose it when the task needs other high-level features but the same low-level ones, and when training time
    counts: the backward pass ends at the lowest block that trains. It costs memory for the whole of those blocks, more
    than an adapter in every block.

    Args:
        n: how many blocks, counted from the output; None takes the last one, or all that ``targets`` names.
        targets: ``"blocks"``, the repeated blocks found in the model, or patterns of modules to take instead.
        exclude: patterns of modules inside them that stay frozen.
        trainable, name: see :class:`lightning_peft.PEFTMethod`. What follows the last block trains in any case.
        layer_decay: learning rates by depth: the rate is multiplied by this for each block further from the output.

    Raises:
        ValueError: n below 1, a decay outside (0, 1].
        TargetError: fewer than n blocks; a pattern matches nothing.

    Example::

        trainer = L.Trainer(callbacks=[lp.LastLayers(n=2, layer_decay=0.8)])
    """

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
