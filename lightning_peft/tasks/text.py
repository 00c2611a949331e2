"""Text classification with any Hugging Face encoder or decoder."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.core.switching.rows import rows
from lightning_peft.pretrained import load_model
from lightning_peft.tasks.optim import adamw


class TextClassifier(L.LightningModule):
    """A text classifier with one label per text.

    A batch may name an adapter for each row, as ``"adapters"`` (see :func:`lightning_peft.rows`).

    Logs ``train/loss``, and ``loss``, ``acc`` (accuracy) and ``f1`` (macro F1) under ``val/`` and ``test/``.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        num_labels: The number of classes; ``None`` uses the number in the model's configuration.
        pretrained: ``False`` builds the same network with random weights, as a baseline for the effect of pretraining.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        config: Changes to the model's configuration. Biases that it adds start at zero.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.

    Example:
        >>> module = TextClassifier("demo")
        >>> module.num_labels
        17
    """

    #: a checkpoint's hyperparameters must not set this, because options of a transformers configuration can name code
    from_user = ("config",)

    def __init__(
        self,
        model: str = "demo",
        num_labels: int | None = None,
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
        from transformers import AutoModelForSequenceClassification

        self.save_hyperparameters()
        changes = {**(config or {}), **({} if num_labels is None else {"num_labels": num_labels})}
        self.model = load_model(AutoModelForSequenceClassification, model, pretrained, dtype, **changes)
        if self.model.config.pad_token_id is None:  # decoders classify the last token that is not padding
            self.model.config.pad_token_id = self.model.config.eos_token_id
        self.num_labels: int = self.model.config.num_labels
        scores = MetricCollection(
            {
                "acc": MulticlassAccuracy(self.num_labels, average="micro"),
                "f1": MulticlassF1Score(self.num_labels, average="macro"),
            }
        )
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")

    def setup(self, stage: str) -> None:
        """Check that the data has as many classes as the model.

        Raises:
            ValueError: The numbers differ.
        """
        labels = getattr(getattr(self.trainer, "datamodule", None), "labels", None)
        if labels is not None and len(labels) != self.num_labels:
            raise ValueError(
                f"the model has {self.num_labels} classes, but the data has {len(labels)} "
                f"({', '.join(map(str, labels[:5]))}{', …' if len(labels) > 5 else ''}): "
                f"pass num_labels={len(labels)} to TextClassifier."
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute logits ``(batch, num_labels)`` from token ids and their mask, both ``(batch, length)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch ``{"input_ids", "attention_mask", "labels"}``."""
        loss, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the ``val/`` metrics."""
        self._evaluate(batch, "val", self.val_scores)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update and log the ``test/`` metrics."""
        self._evaluate(batch, "test", self.test_scores)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the probability of each class, ``(batch, num_labels)``."""
        return self._logits(batch).softmax(-1)

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, with a linear warmup and decay."""
        return adamw(self, self.hparams["lr"], self.hparams["weight_decay"], self.hparams["warmup"])

    def _logits(self, batch: dict[str, Any]) -> Tensor:
        with rows(self, batch.get("adapters")):
            return self(batch["input_ids"], batch["attention_mask"])

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        logits = self._logits(batch)
        return torch.nn.functional.cross_entropy(logits.float(), batch["labels"]), logits

    def _evaluate(self, batch: dict[str, Tensor], stage: str, scores: Any) -> None:
        loss, logits = self._loss(batch)
        scores.update(logits, batch["labels"])
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(logits))
        self.log_dict(scores, prog_bar=True, batch_size=len(logits))
