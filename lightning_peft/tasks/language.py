"""Language modelling, causal or masked, with any Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_peft.core.switching.rows import rows
from lightning_peft.pretrained import NO_CODE, load_model, load_tokenizer, locate
from lightning_peft.tasks.optim import adamw

Objective = Literal["causal", "masked"]


class LanguageModel(L.LightningModule):
    """A language model that predicts the next token (causal) or masked tokens (masked).

    A batch may name an adapter for each row, as ``"adapters"`` (see :func:`lightning_peft.rows`).

    Logs ``train/loss``, ``val/loss`` and ``test/loss``: the mean cross entropy per predicted token, in nats.

    Args:
        model: ``"demo"`` (the embedded model), a Hugging Face folder, or a hub id.
        objective: ``"causal"`` or ``"masked"``; ``None`` uses the objective of the class that the model's configuration
            names. The data must match: set its ``mask`` only for masked models.
        pretrained: ``False`` builds the same network with random weights.
        dtype: The parameters' dtype; ``None`` keeps the stored one.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        export_dir: A folder to which ``fit`` writes the model and its tokenizer at its end, in Hugging Face's format.
        export_dtype: The dtype of the exported weights; ``None`` keeps the current one.
    """

    #: a checkpoint's hyperparameters must not set this, because fit writes to it
    from_user = ("export_dir",)

    def __init__(
        self,
        model: str = "demo",
        objective: Objective | None = None,
        pretrained: bool = True,
        dtype: str | None = "float32",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        export_dir: str | None = None,
        export_dtype: str | None = None,
    ) -> None:
        super().__init__()
        import transformers

        self.save_hyperparameters()
        self.objective: Objective = objective or _objective_of(model)
        auto = {"causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM}
        if self.objective not in auto:
            raise ValueError(f"objective={self.objective!r} is unknown: pass 'causal' or 'masked'.")
        self.model = load_model(auto[self.objective], model, pretrained, dtype)

    def setup(self, stage: str) -> None:
        """Check that the data matches the objective: it masks tokens if and only if the model predicts masked tokens.

        Raises:
            ValueError: The data is for the other objective.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "objective", self.objective) != self.objective:
            raise ValueError(
                f"{type(data).__name__} is for models whose objective is {data.objective!r}; this one's is "
                f"{self.objective!r}: use another model, or LanguageModelData."
            )
        if hasattr(data, "mask") and (data.mask is None) == (self.objective == "masked"):
            fix = "pass mask=0.15, for example," if data.mask is None else "pass mask=None"
            raise ValueError(
                f"the model's objective is {self.objective!r} and the data has mask={data.mask}: {fix} to "
                f"{type(data).__name__}, or another objective to LanguageModel."
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute logits ``(batch, length, vocabulary)`` from token ids ``(batch, length)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch ``{"input_ids", "attention_mask", "labels"}``."""
        return self._loss(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log ``val/loss``."""
        self._loss(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log ``test/loss``."""
        self._loss(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the most likely token at each position, ``(batch, length)``."""
        with rows(self, batch.get("adapters")):
            return self(batch["input_ids"], batch["attention_mask"]).argmax(-1)

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        adapters: Sequence[str | Sequence[str] | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Continue texts with a causal model, greedily by default.

        Args:
            prompts: One or more texts in the format of the training data; they are continued as one batch.
            max_new_tokens: The maximum number of tokens to add to each prompt; the model may end its text earlier.
            adapters: The adapter of each prompt, as for :func:`lightning_peft.rows`; ``None`` uses the active adapters.
            **options: Options of transformers' ``generate`` (``do_sample=True``, ``num_beams=4``).

        Returns:
            The added text of each prompt, without special tokens.

        Raises:
            ValueError: The objective is masked.
            RowError: The adapters are invalid, as for :func:`lightning_peft.rows`.
        """
        if self.objective != "causal":
            raise ValueError("a masked language model cannot continue texts: generate needs objective='causal'.")
        tokenizer = load_tokenizer(self.hparams["model"])
        tokenizer.padding_side = "left"  # generated tokens follow the prompt directly
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        known = {k: batch[k] for k in ("input_ids", "attention_mask")}
        chosen = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
        training = self.training
        self.eval()
        repeats = max(chosen.get("num_beams") or 1, chosen.get("num_return_sequences") or 1)
        try:
            with rows(self, adapters, repeats):
                ids = self.model.generate(**known, max_new_tokens=max_new_tokens, **chosen)
        finally:
            self.train(training)
        return tokenizer.batch_decode(ids[:, known["input_ids"].shape[1] :], skip_special_tokens=True)

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, with a linear warmup and decay."""
        return adamw(self, self.hparams["lr"], self.hparams["weight_decay"], self.hparams["warmup"])

    @rank_zero_only
    def on_fit_end(self) -> None:
        """Write the Hugging Face folder if ``export_dir`` is given, except after a ``fast_dev_run``."""
        if self.hparams["export_dir"] is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export(Path(self.hparams["export_dir"]), self.hparams["export_dtype"])

    def export(self, folder: Path, dtype: str | None = None) -> None:
        """Save the network and its tokenizer as a Hugging Face folder.

        Args:
            folder: The output folder, created if needed; existing files are replaced.
            dtype: The dtype of the stored floating-point weights; ``None`` keeps the current one.
        """
        state = self.model.state_dict()
        if dtype is not None:
            # Cast a tied weight once, so that both names still share one tensor and it is stored once.
            cast = {v.data_ptr(): v.to(getattr(torch, dtype)) for v in state.values() if v.is_floating_point()}
            state = {name: cast.get(v.data_ptr(), v) for name, v in state.items()}
        self.model.save_pretrained(folder, state_dict=state)
        if not (
            folder / "tokenizer_config.json"
        ).is_file():  # keep the tokenizer files that the model's own folder already has
            load_tokenizer(self.hparams["model"]).save_pretrained(folder)

    def _loss(self, batch: dict[str, Any], stage: str) -> Tensor:
        # Labels follow transformers: the model does the causal shift, and labels of -100 are ignored.
        with rows(self, batch.get("adapters")):
            loss = self.model(**{name: value for name, value in batch.items() if name != "adapters"}).loss
        # Weighted by predicted tokens, so that the mean over batches is the mean over tokens.
        predicted = int((batch["labels"][:, int(self.objective == "causal") :] != -100).sum())
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=max(1, predicted))
        return loss


def _objective_of(model: str) -> Objective:
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(locate(model), **NO_CODE).architectures or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return "masked"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    raise ValueError(
        f"the configuration of {model!r} does not name a language model ({', '.join(names) or 'no architecture'}): "
        "pass objective='causal' or objective='masked'."
    )
