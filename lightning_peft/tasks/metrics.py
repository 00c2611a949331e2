"""The metrics of the tasks, all from torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

#: metrics of a classifier, of a regression, and of generated texts
CLASSES = ("acc", "f1", "precision", "recall", "auroc", "mcc")
REGRESSION = ("pearson", "spearman", "mae", "mse", "r2")
TEXT = ("bleu", "rouge1", "rouge2", "rougeL", "exact_match")


def make_metrics(names: Sequence[str], num_labels: int | None = None, multi_label: bool = False) -> Any:
    """A torchmetrics collection.

    Accuracy is micro-averaged; F1, precision, recall and the area under the ROC curve are macro-averaged.

    Args:
        names: Names from the lists above, already checked.
        num_labels: The number of labels of a classifier.
        multi_label: Whether examples may have several labels.
    """
    import torchmetrics as tm
    from torchmetrics import classification as c
    from torchmetrics import text

    def classifier(name: str, **options: Any) -> Any:
        kind = getattr(c, f"Multilabel{name}" if multi_label else f"Multiclass{name}")
        return kind(num_labels, **options)

    makers: dict[str, Any] = {
        "acc": lambda: classifier("Accuracy", average="micro"),
        "f1": lambda: classifier("F1Score", average="macro"),
        "precision": lambda: classifier("Precision", average="macro"),
        "recall": lambda: classifier("Recall", average="macro"),
        "auroc": lambda: classifier("AUROC", average="macro"),
        "mcc": lambda: classifier("MatthewsCorrCoef"),
        "pearson": tm.PearsonCorrCoef,
        "spearman": tm.SpearmanCorrCoef,
        "mae": tm.MeanAbsoluteError,
        "mse": tm.MeanSquaredError,
        "r2": tm.R2Score,
        "perplexity": lambda: text.Perplexity(ignore_index=-100),
        "bleu": text.BLEUScore,
        **{name: partial(_rouge, name) for name in ("rouge1", "rouge2", "rougeL")},
        "exact_match": _exact_match,
    }
    return tm.MetricCollection({name: makers[name]() for name in names})


def _rouge(name: str) -> Any:
    from torchmetrics.text import ROUGEScore

    class Rouge(ROUGEScore):
        """The F-measure of one kind of ROUGE."""

        def compute(self) -> Any:
            return super().compute()[f"{name}_fmeasure"]

    return Rouge(rouge_keys=name)


def _exact_match() -> Any:
    from torchmetrics import MeanMetric

    class ExactMatch(MeanMetric):
        """The fraction of texts that equal one of their references."""

        def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
            for text, wanted in zip(texts, references):
                super().update(float(text.strip() in [other.strip() for other in wanted]))

    return ExactMatch()
