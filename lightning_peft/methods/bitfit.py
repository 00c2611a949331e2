"""BitFit: only the bias terms train.

    y = W x + b',    b' trained

It trains every bias of the base, including those of norm layers: out parameters for an in x out linear layer, about
0.1 % of a transformer. ``targets`` selects a subset; the paper's half-size variant trains the biases of the query
projections and the biases of the first feed-forward layers.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.biases import bias_parameters, buffer_biases
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.selection import SelectionMethod

__all__ = ["BitFit"]


class BitFit(SelectionMethod):
    """Trains the biases of the base and freezes all weights (Ben Zaken et al. 2021, arXiv:2106.10199).

    Choose it when you need as few parameters as possible and the base has biases, as BERT-like encoders, ViT and GPT-2
    do. It costs nothing at inference, but stores activations for every layer, as full fine-tuning does. It cannot train
    models without biases (LLaMA and most later ones).

    Args:
        targets: ``"all"``, or patterns of the modules whose biases train, for example
            ``["query", "intermediate.dense"]``.
        exclude: patterns of modules whose biases stay frozen.
        trainable: patterns of modules that train in full; name a new head here.

    Raises:
        TargetError: if the model has no bias, or a pattern matches nothing with a bias.

    Example::

        trainer = L.Trainer(callbacks=[lp.BitFit(trainable=["classifier"])])
    """

    parameter_count = "the biases"

    def choose(self, model: nn.Module, plan: Plan) -> None:
        biases = {id(value) for _, _, value in bias_parameters(model)}
        chosen = self.matching(model, lambda module, key, value: id(value) in biases)
        if all(is_within(name, *plan.train_modules) for name in chosen):
            why = "its layers have none"
            if buffer_biases(model):
                why = "its quantised layers store theirs as buffers, which cannot train"
            raise TargetError(
                f"BitFit finds no bias in {original_class(model).__name__}{' but in trainable' if chosen else ''}, "
                f"because {why}: use lp.NormTuning or lp.LoRA instead"
            )
        plan.train |= dict.fromkeys(chosen, "bias trains")
