"""Language modelling, causal or masked, with any Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_peft.pretrained import NO_CODE, InputError, load_model, locate
from lightning_peft.tasks.base import Batch
from lightning_peft.tasks.generation import Generator
from lightning_peft.tasks.metrics import TEXT

Objective = Literal["causal", "masked"]


class LanguageModel(Generator):
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
        max_new_tokens: The maximum number of tokens that a causal model writes in validation and ``predict``.
        samples: Log this many generated texts in each validation, if the data has prompts.
        metrics: ``perplexity``, and for data with prompts ``bleu``, ``rouge1``, ``rouge2``, ``rougeL`` and
            ``exact_match`` of the generated texts; none by default, because generation is slow.
    """

    #: a checkpoint's hyperparameters must not set this, because fit writes to it
    from_user = ("export_dir",)
    _packs_are_separate = False

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
        max_new_tokens: int = 64,
        samples: int = 0,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(max_new_tokens, samples, lr=lr, weight_decay=weight_decay, warmup=warmup, metrics=metrics)
        import transformers

        self.objective: Objective = objective or _objective_of(model)
        auto = {"causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM}
        if self.objective not in auto:
            raise InputError(f"objective={self.objective!r} is unknown: pass 'causal' or 'masked'.")
        self.model = load_model(auto[self.objective], model, pretrained, dtype)
        if self.objective == "masked" and (texts := [*filter(TEXT.__contains__, self.metrics)] or self.samples):
            raise InputError(
                f"a masked language model does not write texts, which {texts!r} needs: use a causal model."
            )
        self.build_metrics()

    def setup(self, stage: str) -> None:
        """Check that the data matches the objective: it masks tokens if and only if the model predicts masked tokens.

        Raises:
            InputError: if the data is for the other objective.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "mask") and (data.mask is None) == (self.objective == "masked"):
            fix = "pass mask=0.15, for example," if data.mask is None else "pass mask=None"
            raise InputError(
                f"the model's objective is {self.objective!r} and the data has mask={data.mask}: {fix} to "
                f"{type(data).__name__}, or another objective to LanguageModel."
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Compute logits ``(batch, length, vocabulary)`` from token ids ``(batch, length)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of a batch ``{"input_ids", "attention_mask", "labels"}``, and the logits."""
        if "position_ids" in batch and not self._packs_are_separate:
            self._check_packs(batch)
        # Labels follow transformers: the model does the causal shift, and labels of -100 are ignored.
        inputs = {name: value for name, value in batch.items() if name != "adapters"}
        # With a cache, transformers would treat the packed texts as one text.
        output = self.model(**inputs, **({"use_cache": False} if "position_ids" in batch else {}))
        return output.loss, output.logits

    @torch.no_grad()
    def _check_packs(self, batch: Batch) -> None:
        """Refuse packed texts if they influence one another; one text's output is compared with its output alone."""
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        if len(starts) < 2:
            return
        first, last = starts[1], [*starts, batch["position_ids"].shape[1]][2]
        ids, positions = batch["input_ids"][:1, :last], batch["position_ids"][:1, :last]
        training = self.training
        self.eval()
        packed = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, first:].float()
        alone = self.model(input_ids=ids[:, first:]).logits[0].float()
        self.train(training)
        if (packed - alone).abs().max() > 0.05 * alone.abs().max():
            raise InputError(
                f"{type(self.model).__name__} lets packed texts attend to one another, because it ignores that "
                "position_ids restart at 0: pass packing=False to the data."
            )
        self._packs_are_separate = True

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with logits ``(batch, length, vocabulary)``."""
        shift = int(self.objective == "causal")
        if len(scores):
            scores.update(output[:, : output.shape[1] - shift].float(), batch["labels"][:, shift:])

    def weight(self, batch: Batch) -> int:
        """The number of predicted tokens, so that the mean over batches is the mean over tokens."""
        return int((batch["labels"][:, int(self.objective == "causal") :] != -100).sum())

    def prompts_of(self, batch: Batch) -> list[list[int]]:
        """The tokens before the first predicted one."""
        prompts = []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
            first = int((labels != -100).int().argmax())
            prompts.append(ids[: max(1, first)][mask[: max(1, first)].bool()].tolist())
        return prompts

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """Return the continuation of each text; of a masked model, the most likely token ids ``(batch, length)``."""
        if self.objective == "causal":
            return super().predict_step(batch, batch_idx)
        with self.adapters_of(batch):
            return self(batch["input_ids"], batch["attention_mask"]).argmax(-1)

    def prediction_columns(self, output: Any, batch: Batch) -> dict[str, Any]:
        """``prediction``, the generated text; of a masked model, the text of the most likely tokens."""
        if self.objective == "masked":
            kept = [ids[mask.bool()] for ids, mask in zip(output, batch["attention_mask"])]
            output = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return {"prediction": list(output)}

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        adapters: Sequence[str | Sequence[str] | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Continue texts with a causal model; see :meth:`Generator.generate`.

        Raises:
            ValueError: if the objective is masked.
        """
        if self.objective != "causal":
            raise InputError("a masked language model cannot continue texts: generate needs objective='causal'.")
        return super().generate(prompts, max_new_tokens, adapters, **options)

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
            self.tokenizer.save_pretrained(folder)


def _objective_of(model: str) -> Objective:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(locate(model), **NO_CODE)
    names = config.architectures or []
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{model!r} has an encoder and a decoder: use the task SequenceToSequence with SequenceToSequenceData."
        )
    if any(name.endswith("ForMaskedLM") for name in names):
        return "masked"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    raise InputError(
        f"the configuration of {model!r} does not name a language model ({', '.join(names) or 'no architecture'}): "
        "pass objective='causal' or objective='masked'."
    )
