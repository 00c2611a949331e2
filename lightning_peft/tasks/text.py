"""Classification of texts and pairs of texts, and regression on them, with any Hugging Face encoder or decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.pretrained import load_model
from lightning_peft.tasks.base import Batch, Classifier, Task, inputs_of, label_loss
from lightning_peft.tasks.metrics import CLASSES, REGRESSION


class TextClassifier(Classifier):
    """A classifier of texts or pairs of texts, with one label or several labels each.

    Logs ``train/loss``, and ``loss`` and the metrics under ``val/`` and ``test/``.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        num_labels: The number of classes; ``None`` uses that of the data, or without data the number in the model's
            configuration. A head whose width differs from the stored head's starts from random weights.
        pretrained: ``False`` builds the same network with random weights, as a baseline for the effect of pretraining.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        config: Changes to the model's configuration. Biases that it adds start at zero.
        labels: The names of the classes, in the order of the outputs; ``None`` uses those of the data.
        multi_label: Whether a text may have several labels; a DataModule with several labels sets it.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        metrics: ``acc`` (accuracy), ``f1``, ``precision``, ``recall``, ``auroc`` (all macro) and ``mcc`` (Matthews
            correlation); ``acc`` and ``f1`` by default.

    Example:
        >>> module = TextClassifier("demo")
        >>> module.num_labels
        17
    """

    #: a checkpoint's hyperparameters must not set this, because options of a transformers configuration can name code
    from_user = ("config",)
    metric_names = ("acc", "f1")
    known_metrics = CLASSES
    auto_class = "AutoModelForSequenceClassification"

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
        labels: list[str] | None = None,
        multi_label: bool = False,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, metrics)
        self.multi_label = multi_label
        self.build(num_labels, labels)

    def created(self) -> None:
        """Create the metrics, and complete the network's configuration."""
        _pad(self.model)
        if self.multi_label:
            self.model.config.problem_type = "multi_label_classification"
        super().created()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Compute logits ``(batch, num_labels)`` from token ids and their mask, both ``(batch, length)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of a batch ``{"input_ids", "attention_mask", "labels"}``, and the logits."""
        logits = self(**inputs_of(batch))
        return label_loss(logits, batch["labels"]), logits

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with logits ``(batch, num_labels)``."""
        scores.update(output, batch["labels"].long())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of each class, ``(batch, num_labels)``."""
        with self.adapters_of(batch):
            logits = self(**inputs_of(batch)).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def prediction_columns(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """``label``, the most likely one, and its ``probability``."""
        return dict(self.label_columns(output))


class TextRegressor(Task):
    """Predicts a number for each text or pair of texts.

    Logs ``train/loss``, and ``loss`` (the mean squared error) and the metrics under ``val/`` and ``test/``.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        metrics: ``pearson``, ``spearman``, ``mae``, ``mse`` and ``r2``; ``pearson`` and ``mae`` by default.
    """

    metric_names = ("pearson", "mae")
    known_metrics = REGRESSION

    def __init__(
        self,
        model: str = "demo",
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, metrics)
        from transformers import AutoModelForSequenceClassification

        self.model = load_model(
            AutoModelForSequenceClassification, model, pretrained, dtype, num_labels=1, problem_type="regression"
        )
        _pad(self.model)
        self.build_metrics()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Compute a number for each text, ``(batch,)``, from token ids and their mask, both ``(batch, length)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits.squeeze(-1).float()

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of a batch ``{"input_ids", "attention_mask", "labels"}``, and the numbers."""
        numbers = self(**inputs_of(batch))
        return nn.functional.mse_loss(numbers, batch["labels"].float()), numbers

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with numbers ``(batch,)``."""
        scores.update(output, batch["labels"].float())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the number of each text, ``(batch,)``."""
        with self.adapters_of(batch):
            return self(**inputs_of(batch))

    def prediction_columns(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """``prediction``, the number."""
        return {"prediction": output.tolist()}


def _pad(model: Any) -> None:
    """Give a model a padding token: decoders classify the last token that is not padding."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
