"""Extractive question answering with any Hugging Face encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.pretrained import load_model
from lightning_peft.tasks.base import Batch, Task, inputs_of
from lightning_peft.tasks.metrics import SQUAD

#: the longest answer, in tokens
_LONGEST = 30


class QuestionAnswering(Task):
    """Finds the answer to a question in a context.

    Logs ``train/loss``, and ``loss`` and the metrics under ``val/`` and ``test/``. Use
    :class:`lightning_peft.data.QuestionAnsweringData`.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        metrics: ``squad_exact_match`` and ``squad_f1``, in percent; both by default.
    """

    metric_names = SQUAD
    known_metrics = SQUAD

    def __init__(
        self,
        model: str = "demo",
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, metrics)
        from transformers import AutoModelForQuestionAnswering

        self.model = load_model(AutoModelForQuestionAnswering, model, pretrained, dtype, num_labels=2)
        self.build_metrics()

    def forward(self, **inputs: Tensor) -> Tensor:
        """Compute logits ``(batch, length, 2)`` of the first and the last token of the answer."""
        output = self.model(**inputs)
        return torch.stack([output.start_logits, output.end_logits], -1)

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of both ends of the answers, and the logits ``(batch, length, 2)``."""
        logits = self(**inputs_of(batch))
        return nn.functional.cross_entropy(logits.float(), batch["labels"]), logits

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with the answers of logits ``(batch, length, 2)``."""
        found = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(self.answers(output, batch))]
        wanted = [
            {"answers": {"text": [text], "answer_start": [0]}, "id": str(i)} for i, text in enumerate(batch["answers"])
        ]
        scores.update(found, wanted)

    def answers(self, logits: Tensor, batch: Batch) -> list[str]:
        """The most likely answer of each row; empty if the context has none."""
        texts = []
        for (start, end), offsets, context in zip(logits.float().mT, batch["offsets"], batch["contexts"]):
            inside = torch.tensor([a >= 0 for a, _ in offsets], device=logits.device)
            pairs = start[: len(inside), None] + end[None, : len(inside)]
            allowed = (inside[:, None] & inside).triu().tril(_LONGEST - 1)
            allowed[0, 0] = True  # the context has no answer
            best = int(pairs.masked_fill(~allowed, float("-inf")).argmax())
            first, last = divmod(best, len(inside))
            texts.append(context[offsets[first][0] : offsets[last][1]] if best else "")
        return texts

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """Return the answer of each row."""
        with self.adapters_of(batch):
            return self.answers(self(**inputs_of(batch)), batch)
