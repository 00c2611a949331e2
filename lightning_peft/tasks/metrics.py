"""The metrics of the tasks, all from torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

#: metrics of a classifier, of extracted answers, of a regression, and of generated texts
CLASSES = ("acc", "f1", "precision", "recall", "auroc", "mcc")
SQUAD = ("squad_exact_match", "squad_f1")
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
        **{
            name: partial(_one_of, text.ROUGEScore, f"{name}_fmeasure", rouge_keys=name)
            for name in ("rouge1", "rouge2", "rougeL")
        },
        "exact_match": partial(make_fraction, exact_match=True),
        "squad_exact_match": partial(_one_of, text.SQuAD, "exact_match"),
        "squad_f1": partial(_one_of, text.SQuAD, "f1"),
    }
    return tm.MetricCollection({name: makers[name]() for name in names})


def _one_of(kind: Any, value: str, **options: Any) -> Any:
    """One value of a metric that returns several."""

    class OneOf(kind):  # type: ignore[misc]
        def compute(self) -> Any:
            return super().compute()[value]

    return OneOf(**options)


def make_fraction(exact_match: bool = False) -> Any:
    """The fraction of hits; with ``exact_match``, of texts that equal one of their references."""
    import torch
    from torchmetrics import Metric

    class Fraction(Metric):  # MeanMetric adds in place, which fails if validate ran in inference mode before a fit
        hits: torch.Tensor
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("hits", torch.zeros(()), "sum")
            self.add_state("count", torch.zeros(()), "sum")

        def update(self, hits: Any, references: Any = None) -> None:
            if exact_match:
                pairs = zip(hits, references)
                hits = torch.tensor([text.strip() in [other.strip() for other in wanted] for text, wanted in pairs])
            self.hits = self.hits + hits.sum().to(self.hits.device)
            self.count = self.count + len(hits)

        def compute(self) -> Any:
            return self.hits / self.count

    return Fraction()
