"""BitFit: only the bias terms train.

    y = W x + b',    b' trained

Trains every bias of the base, of its norm layers too: out parameters for a linear layer of in x out, about 0.1 % of
a transformer. With ``targets`` a subset; the paper's half-size variant trains the biases of the query and of the
second feed-forward layer.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.selection import SelectionMethod

__all__ = ["BitFit"]


class BitFit(SelectionMethod):
    """BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): the biases of the base train, all weights are frozen.

    Choose it when the fewest parameters matter and the base has biases: BERT-like encoders, ViT, GPT-2. It costs
    nothing at inference and adds no module, but activations are kept for every layer as in full fine-tuning. Models
    without biases (LLaMA and most since) have nothing to train here.

    Args:
        targets: ``"all"`` biases, or patterns of the modules whose biases train, as in
            ``["query", "intermediate.dense"]``.
        exclude: patterns of modules whose biases stay frozen.
        trainable: patterns of modules that train in full; a new head belongs here.

    Raises:
        TargetError: the model has no bias, or a pattern matches nothing that has one.

    Example::

        trainer = L.Trainer(callbacks=[lp.BitFit(trainable=["classifier"])])
    """

    def choose(self, model: nn.Module, plan: Plan) -> None:
        chosen = self.matching(model, _is_bias)
        if all(is_within(name, *plan.train_modules) for name in chosen):
            raise TargetError(
                f"BitFit finds no bias in {original_class(model).__name__}{' but in trainable' if chosen else ''}, "
                "whose layers were built without: NormTuning or LoRA train models of this kind"
            )
        plan.train |= dict.fromkeys(chosen, "bias trains")


def _is_bias(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    # bias; in_proj_bias of an attention; bias_ih_l0 of an LSTM. Its bias_k and bias_v are tokens and have 3 dimensions.
    return parameter.ndim == 1 and (key == "bias" or key.endswith("_bias") or key.startswith("bias_"))
