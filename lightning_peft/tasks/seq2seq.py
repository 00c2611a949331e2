"""Sequence to sequence: summarisation and translation with an encoder and a decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.pretrained import load_model
from lightning_peft.tasks.base import Batch
from lightning_peft.tasks.generation import Generator


class SequenceToSequence(Generator):
    """A model with an encoder and a decoder, such as T5 or BART, that writes a text for each input text.

    Logs ``train/loss``, and ``loss`` (the mean cross entropy per token, in nats) and the metrics under ``val/`` and
    ``test/``. Use :class:`lightning_peft.data.SequenceToSequenceData`.

    Args:
        model: A Hugging Face folder, or a hub id.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        max_new_tokens: The maximum number of tokens to write in validation and ``predict``.
        samples: Log this many generated texts in each validation.
        metrics: ``bleu``, ``rouge1``, ``rouge2``, ``rougeL`` and ``exact_match`` of the generated texts, and
            ``perplexity``; none by default, because generation is slow.
    """

    objective = "seq2seq"
    joins_prompt = False

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        max_new_tokens: int = 64,
        samples: int = 0,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(max_new_tokens, samples, lr=lr, weight_decay=weight_decay, warmup=warmup, metrics=metrics)
        from transformers import AutoModelForSeq2SeqLM

        self.model = load_model(AutoModelForSeq2SeqLM, model, pretrained, dtype)
        self.build_metrics()

    def forward(self, **batch: Tensor) -> Any:
        """Compute the network's output for ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, length)``."""
        return self.model(**batch)

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of a batch ``{"input_ids", "attention_mask", "labels"}``, and the logits."""
        output = self(**{name: value for name, value in batch.items() if name != "adapters"})
        return output.loss, output.logits

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with logits ``(batch, length, vocabulary)``."""
        if len(scores):
            scores.update(output.float(), batch["labels"])

    def weight(self, batch: Batch) -> int:
        """The number of predicted tokens."""
        return int((batch["labels"] != -100).sum())

    def prompts_of(self, batch: Batch) -> list[list[int]]:
        """The encoder's tokens."""
        return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
