"""Audio classification with any Hugging Face model of sound."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.tasks.base import Batch, Classifier, inputs_of, label_loss
from lightning_peft.tasks.metrics import CLASSES


class AudioClassifier(Classifier):
    """A classifier of recordings, such as wav2vec 2.0, HuBERT or WavLM with a head.

    Logs ``train/loss``, and ``loss`` and the metrics under ``val/`` and ``test/``. Use
    :class:`lightning_peft.data.AudioFolderData`.

    Args:
        model: A Hugging Face folder, or a hub id.
        num_labels: The number of classes; ``None`` uses that of the data.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        labels: The names of the classes, in the order of the outputs; ``None`` uses those of the data.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        metrics: ``acc``, ``f1``, ``precision``, ``recall``, ``auroc`` and ``mcc``; ``acc`` and ``f1`` by default.
    """

    auto_class = "AutoModelForAudioClassification"
    metric_names = ("acc", "f1")
    known_metrics = CLASSES

    def __init__(
        self,
        model: str,
        num_labels: int | None = None,
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        labels: list[str] | None = None,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, metrics)
        self.build(num_labels, labels)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute logits ``(batch, num_labels)`` from waves and their mask, both ``(batch, samples)``."""
        return self.model(input_values, attention_mask=attention_mask).logits

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of a batch ``{"input_values", "attention_mask", "labels"}``, and the logits."""
        logits = self(**inputs_of(batch))
        return label_loss(logits, batch["labels"]), logits

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with logits ``(batch, num_labels)``."""
        scores.update(output, batch["labels"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of each class, ``(batch, num_labels)``."""
        with self.adapters_of(batch):
            return self(**inputs_of(batch)).float().softmax(-1)

    def prediction_columns(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """``label``, the most likely one, and its ``probability``."""
        return dict(self.label_columns(output))
