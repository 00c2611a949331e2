"""P-tuning: virtual tokens among the input's that a small network makes.

    E' = [P; E],    P = f(H),    H in R^{T x d}

f is an MLP of three layers (d -> h -> h -> d, ReLU), or a bidirectional LSTM of width h followed by an MLP of two
(2h -> 2h -> d): T d + (d h + h) + (h h + h) + (h d + d) parameters with the MLP. The network steadies training; P is
all that is needed afterwards.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.methods.families.arguments import optional, positive_int, probability
from lightning_peft.methods.families.sequence import PromptMethod

__all__ = ["PTuning"]


class PTuning(PromptMethod):
    """Virtual tokens that a small network makes (Liu et al. 2021, arXiv:2103.10385).

    Like :class:`lightning_peft.PromptTuning` outside. :func:`lightning_peft.fold` replaces the network by the prompt it
    makes, after training; checkpoints before that keep it, so that training resumes exactly.

    Choose it where prompt tuning is unstable or too slow to learn, on natural-language-understanding tasks above
    all. It costs some h (2 d + h) parameters while training (h = d by default), and T positions of the context for
    good; it cannot be merged.

    Args:
        num_virtual_tokens: T; 20 by default.
        targets, exclude, trainable, name: see :class:`lightning_peft.PromptTuning`.
        position: ``"prefix"``, ``"after_bos"`` or ``"suffix"``, as of :class:`lightning_peft.PromptTuning`.
        template: any other place, as words: ``"v8 x1 v4 x*"``, as of :class:`lightning_peft.PromptTuning`.
        side: of an encoder-decoder: ``"encoder"`` or ``"decoder"``.
        encoder: ``"mlp"`` or ``"lstm"``.
        hidden_size: h, the network's width; the token width by default.
        num_layers: of the LSTM.
        dropout: between the LSTM's layers; needs at least two of them.
        folded_prompt: whether the prompt is trained directly; :func:`lightning_peft.fold` sets it.

    Raises:
        ValueError: an argument that cannot be, or one of the LSTM's with the MLP.
        TargetError: see :class:`lightning_peft.PromptTuning`.

    Example::

        trainer = L.Trainer(callbacks=[lp.PTuning(20, template="v10 x1 v10 x*", trainable=["classifier"])])
    """

    resume_may_differ = PromptMethod.resume_may_differ | {"dropout"}

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden_size: int | None = field(default=None, validator=optional(positive_int))
    num_layers: int = field(default=2, validator=positive_int)
    dropout: float = field(default=0.0, validator=probability)
    folded_prompt: bool = False

    def check(self) -> None:
        super().check()
        if self.encoder == "mlp" and (self.num_layers != 2 or self.dropout):
            raise ValueError("num_layers and dropout are the LSTM's: set encoder='lstm', or leave them out")
        if self.dropout and self.num_layers == 1:
            raise ValueError("dropout works between the LSTM's layers: set num_layers to 2 or more, or dropout=0")

    def build(self, name: str, width: int, tokens: int, embedding: nn.Embedding | None) -> Tensor | nn.Module:
        if self.folded_prompt:
            return torch.randn(tokens, width)
        hidden = self.hidden_size or width
        return PromptEncoder(tokens, width, hidden, self.num_layers if self.encoder == "lstm" else 0, self.dropout)

    def without_reparameterization(self) -> PTuning:
        """This method with a direct prompt, as a model has it after :func:`lightning_peft.fold`."""
        method = copy.copy(self)
        method.folded_prompt = True
        return method


class PromptEncoder(nn.Module):
    """f and H: makes the virtual tokens (T, width). With ``layers`` an LSTM comes before the MLP."""

    def __init__(self, tokens: int, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.lstm = None
        if layers:
            self.lstm = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def forward(self) -> Tensor:
        x = self.embedding
        return self.mlp(x if self.lstm is None else self.lstm(x)[0])
