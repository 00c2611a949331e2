"""Text embeddings, learned by contrast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.pretrained import InputError, load_model
from lightning_peft.tasks.base import Batch, Task
from lightning_peft.tasks.metrics import make_fraction


class TextEmbedder(Task):
    """Embeds texts so that the two texts of a pair are close, and texts of different pairs are far apart.

    An embedding is the mean over the tokens, scaled to length 1. The loss is the cross entropy of finding each text's
    partner among the partners of the batch, in both directions (InfoNCE, arXiv:1807.03748); larger batches make the
    task harder.

    Logs ``train/loss``, and ``loss`` and ``acc`` (how often the partner is the closest in its batch) under ``val/`` and
    ``test/``. Use :class:`lightning_peft.data.TextPairData`.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        temperature: Divides the cosine similarities.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
    """

    metric_names = ("acc",)
    known_metrics = ("acc",)
    prediction_suffix = ".safetensors"

    def __init__(
        self,
        model: str = "demo",
        pretrained: bool = True,
        dtype: str | None = "float32",
        temperature: float = 0.05,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(lr, weight_decay, warmup)
        from torchmetrics import MetricCollection
        from transformers import AutoModel

        if temperature <= 0:
            raise InputError(f"temperature={temperature}: it must be positive.")
        self.model = load_model(AutoModel, model, pretrained, dtype)
        self.temperature = temperature
        scores = MetricCollection({"acc": make_fraction()})
        self.val_scores, self.test_scores = scores.clone(prefix="val/"), scores.clone(prefix="test/")

    @property
    def fresh_modules(self) -> list[str]:
        """None, because embeddings are a mean over tokens, so a pooling layer without weights is not used."""
        return []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Compute embeddings ``(batch, width)`` from token ids and their mask, both ``(batch, length)``."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state.float()
        weights = attention_mask.unsqueeze(-1)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch ``{"texts", "pairs"}`` of tokenized texts, and the similarities."""
        similar = self(**batch["texts"]) @ self(**batch["pairs"]).mT / self.temperature
        partners = torch.arange(len(similar), device=similar.device)
        losses = [nn.functional.cross_entropy(way, partners) for way in (similar, similar.mT)]
        return sum(losses) / 2, similar  # type: ignore[return-value]

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with similarities ``(batch, batch)``."""
        scores.update(output.argmax(-1) == torch.arange(len(output), device=output.device))

    def weight(self, batch: Batch) -> int:
        """The number of pairs."""
        return len(batch["texts"]["input_ids"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the embedding of each text, ``(batch, width)``."""
        with self.adapters_of(batch):
            return self(**batch["texts"])

    def prediction_columns(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """``embedding``, the embeddings."""
        return {"embedding": output}
