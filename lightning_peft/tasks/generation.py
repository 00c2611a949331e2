"""The base class of the tasks that write texts: generation, its metrics, and samples during validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_peft.core.switching.rows import rows
from lightning_peft.pretrained import InputError, load_tokenizer
from lightning_peft.tasks.base import Batch, Task
from lightning_peft.tasks.metrics import TEXT, make_metrics

#: the DataModule to suggest for each objective
_DATA = {"causal": "GenerationData", "masked": "LanguageModelData", "seq2seq": "SequenceToSequenceData"}


class Generator(Task):
    """A task whose network writes texts. The base class of :class:`LanguageModel` and :class:`SequenceToSequence`.

    Args:
        max_new_tokens: The maximum number of tokens to write in validation and ``predict``.
        samples: Write this many texts of the first validation batch to the log and the loggers in each validation.
        **options: ``lr``, ``weight_decay``, ``warmup`` and ``metrics``, as for :class:`Task`.
    """

    known_metrics = (*TEXT, "perplexity")
    model: Any
    objective: str
    joins_prompt = True
    """Whether a generated sequence begins with its prompt, as it does for a decoder alone."""

    def __init__(self, max_new_tokens: int = 64, samples: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if max_new_tokens < 1 or samples < 0:
            raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1 and samples={samples} at least 0.")
        self.max_new_tokens, self.samples = max_new_tokens, samples
        self._tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Check before training that the data is for this kind of model.

        Raises:
            InputError: if it is not.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "objective", self.objective) != self.objective:
            raise InputError(
                f"{type(data).__name__} is for models whose objective is {data.objective!r}; this one's is "
                f"{self.objective!r}: use another model, or {_DATA[self.objective]}."
            )

    def build_metrics(self, num_labels: int | None = None) -> None:
        """Create the validation and test metrics. Metrics of generated texts are separate, because they need
        generation."""
        for stage in ("val", "test"):
            texts = make_metrics([name for name in self.metrics if name in TEXT])
            others = make_metrics([name for name in self.metrics if name not in TEXT])
            setattr(self, f"{stage}_texts", texts.clone(prefix=f"{stage}/"))
            setattr(self, f"{stage}_scores", others.clone(prefix=f"{stage}/"))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.hparams["model"])
        return self._tokenizer

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        adapters: Sequence[str | Sequence[str] | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Write a text for each prompt, greedily by default.

        Args:
            prompts: One or more texts in the format of the training data; they are answered as one batch.
            max_new_tokens: The maximum number of tokens to write for each prompt; the model may end its text earlier.
            adapters: The adapter of each prompt, as for :func:`lightning_peft.rows`; ``None`` uses the active adapters.
            **options: Options of transformers' ``generate`` (``do_sample=True``, ``num_beams=4``).

        Returns:
            The new text of each prompt, without special tokens.

        Raises:
            InputError: if a prompt leaves no position for a new token.
            RowError: if the adapters are invalid, as for :func:`lightning_peft.rows`.
        """
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=self._side()).to(self.device)
        return self.write(batch["input_ids"], batch["attention_mask"], max_new_tokens, adapters, **options)

    def write(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, adapters: Any = None, **options: Any
    ) -> list[str]:
        """Write a text for each prompt of a batch of token ids ``(batch, length)``, padded on the left."""
        tokenizer, length = self.tokenizer, input_ids.shape[1]
        if self.joins_prompt and self.max_positions is not None:
            max_new_tokens = min(max_new_tokens, self.max_positions - length)
            if max_new_tokens < 1:
                raise InputError(
                    f"a prompt has {length} tokens and the model {self.max_positions} positions, so there is none left "
                    f"for a new token: pass max_length={self.max_positions // 2}, for example, to the data."
                )
        chosen = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        if ends:
            chosen.setdefault("eos_token_id", sorted(ends))
        training = self.training
        self.eval()
        repeats = max(chosen.get("num_beams") or 1, chosen.get("num_return_sequences") or 1)
        try:
            with rows(self, adapters, repeats):
                ids = self.model.generate(
                    input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **chosen
                )
        finally:
            self.train(training)
        return tokenizer.batch_decode(ids[:, length:] if self.joins_prompt else ids, skip_special_tokens=True)

    def prompts_of(self, batch: Batch) -> list[list[int]]:
        """The prompt's token ids of each row of a labelled batch."""
        raise NotImplementedError

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """Return the generated text of each row."""
        return self.write(batch["input_ids"], batch["attention_mask"], self.max_new_tokens, batch.get("adapters"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and the metrics under ``val/``, and samples."""
        super().validation_step(batch, batch_idx)
        self._score_texts(batch, "val", self.samples if batch_idx == 0 else 0)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and the metrics under ``test/``."""
        super().test_step(batch, batch_idx)
        self._score_texts(batch, "test", 0)

    def _side(self) -> Literal["left", "right"]:
        return "left" if self.joins_prompt else "right"

    def _score_texts(self, batch: Batch, stage: str, samples: int) -> None:
        scores = getattr(self, f"{stage}_texts")
        count = len(batch["labels"]) if len(scores) else min(samples, len(batch["labels"]))
        if not count:
            return
        prompts = self.prompts_of(batch)[:count]
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side=self._side()).to(
            self.device
        )
        adapters = batch["adapters"][:count] if "adapters" in batch else None
        texts = self.write(padded["input_ids"], padded["attention_mask"], self.max_new_tokens, adapters)
        wanted = self.tokenizer.batch_decode(
            [[i for i in row if i != -100] for row in batch["labels"][:count].tolist()], skip_special_tokens=True
        )
        if len(scores):
            scores.update(texts, [[text] for text in wanted])
            self.log_dict(scores, prog_bar=True, batch_size=count)
        if samples:
            shown = self.tokenizer.batch_decode(prompts[:samples], skip_special_tokens=True)
            self._log_samples([list(row) for row in zip(shown, texts, wanted)])

    def _log_samples(self, samples: list[list[str]]) -> None:
        for prompt, text, wanted in samples:
            rank_zero_info(f"sample after step {self.global_step}: {prompt!r} -> {text!r} (expected {wanted!r})")
        for logger in cast("list[Any]", self.loggers):
            if hasattr(logger, "log_text"):
                logger.log_text("val/samples", columns=["prompt", "generated", "expected"], data=samples)
            elif hasattr(logger.experiment, "add_text"):
                table = "\n\n".join(f"**{p}**\n\n{text}\n\n*{wanted}*" for p, text, wanted in samples)
                logger.experiment.add_text("val/samples", table, self.global_step)
