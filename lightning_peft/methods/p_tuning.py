"""P-tuning: a small network computes the embeddings of virtual tokens, which are inserted into the input sequence.

    E' = [P; E],    P = f(H),    H in R^{T x d}

f is an MLP of three layers (d -> h -> h -> d, ReLU), or a bidirectional LSTM of width h followed by an MLP of two
layers (2h -> 2h -> d). With the MLP, T d + (d h + h) + (h h + h) + (h d + d) parameters train. The network stabilises
training; afterwards only P is needed.

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
    """Inserts virtual tokens computed by a small network into the input (Liu et al. 2021, arXiv:2103.10385).

    The virtual tokens work as in :class:`lightning_peft.PromptTuning`. After training, :func:`lightning_peft.fold`
    replaces the network by its output. Until then checkpoints contain the network, so that training resumes exactly.

    Choose it if prompt tuning is unstable or learns too slowly, mainly on natural-language-understanding tasks. It
    costs about h (2 d + h) more parameters during training (h = d by default) and T positions of the context, and
    cannot be merged.

    Args:
        encoder: the network: ``"mlp"`` or ``"lstm"``.
        hidden_size: width h of the network; None takes the width of a token embedding.
        num_layers: number of LSTM layers.
        dropout: dropout probability between LSTM layers; it needs at least two of them.
        folded_prompt: train the prompt directly, without the network; :func:`lightning_peft.fold` sets it.

    Raises:
        ValueError: if an argument is invalid, or an LSTM argument is set with ``encoder="mlp"``.
        TargetError: see :class:`lightning_peft.PromptTuning`.

    Example::

        trainer = L.Trainer(callbacks=[lp.PTuning(20, template="v10 x1 v10 x*", trainable=["classifier"])])
    """

    parameter_count = "T d and an encoder, which `lp.fold` removes"
    resume_may_differ = PromptMethod.resume_may_differ | {"dropout"}

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden_size: int | None = field(default=None, validator=optional(positive_int))
    num_layers: int = field(default=2, validator=positive_int)
    dropout: float = field(default=0.0, validator=probability)
    folded_prompt: bool = False

    def check(self) -> None:
        super().check()
        if self.encoder == "mlp" and (self.num_layers != 2 or self.dropout):
            raise ValueError("num_layers and dropout apply to the LSTM only: set encoder='lstm', or remove them")
        if self.dropout and self.num_layers == 1:
            raise ValueError("dropout acts between LSTM layers: set num_layers to 2 or more, or dropout=0")

    def build(self, name: str, width: int, tokens: int, embedding: nn.Embedding | None) -> Tensor | nn.Module:
        if self.folded_prompt:
            return torch.randn(tokens, width)
        hidden = self.hidden_size or width
        return PromptEncoder(tokens, width, hidden, self.num_layers if self.encoder == "lstm" else 0, self.dropout)

    def without_reparameterization(self) -> PTuning:
        """A copy of this method with a directly trained prompt, as after :func:`lightning_peft.fold`."""
        method = copy.copy(self)
        method.folded_prompt = True
        return method


class PromptEncoder(nn.Module):
    """f and H: computes the virtual tokens (T, width). If ``layers`` > 0, an LSTM precedes the MLP."""

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
