"""Labelling of the words of a text with any Hugging Face encoder or decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.tasks.base import Batch, Classifier, inputs_of, label_loss
from lightning_peft.tasks.metrics import CLASSES


class TokenClassifier(Classifier):
    """A classifier of each word of a text: named entities, parts of speech, slots.

    Logs ``train/loss``, and ``loss`` and the metrics under ``val/`` and ``test/``; each word counts once.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        num_labels: The number of labels; ``None`` uses that of the data.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        labels: The names of the labels, in the order of the outputs; ``None`` uses those of the data.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        metrics: ``acc``, ``f1``, ``precision``, ``recall``, ``auroc`` and ``mcc``, of words; ``acc`` and ``f1`` by
            default.
    """

    auto_class = "AutoModelForTokenClassification"
    metric_names = ("acc", "f1")
    known_metrics = CLASSES

    def __init__(
        self,
        model: str = "demo",
        num_labels: int | None = None,
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        labels: list[str] | None = None,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, metrics)
        self.build(num_labels, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Compute logits ``(batch, length, num_labels)`` from token ids and their mask, both ``(batch, length)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of the words, and the logits ``(words, num_labels)``."""
        words = batch["labels"] != -100
        logits = self(**inputs_of(batch))[words]
        return label_loss(logits, batch["labels"][words]), logits

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with logits ``(words, num_labels)``."""
        scores.update(output, batch["labels"][batch["labels"] != -100])

    def weight(self, batch: Batch) -> int:
        """The number of words."""
        return int((batch["labels"] != -100).sum())

    def predict_step(self, batch: Batch, batch_idx: int) -> list[list[str | None]]:
        """Return the label of each word of each text; None for a word beyond the data's ``max_length``."""
        with self.adapters_of(batch):
            numbers = self(**inputs_of(batch)).argmax(-1).tolist()
        names = self.names()
        return [
            [names[row[start]] if start >= 0 else None for start in starts]
            for row, starts in zip(numbers, batch["starts"])
        ]
