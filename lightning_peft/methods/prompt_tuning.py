"""Prompt tuning: trained embeddings are inserted into the input sequence.

    E' = [P; E],    P in R^{T x d}

T d parameters train for the whole model. The base processes T additional tokens, but outputs, labels and masks keep
their lengths for the caller.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.methods.families.arguments import as_list
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.methods.families.sequence import PromptMethod
from lightning_peft.pretrained import load_tokenizer

__all__ = ["PromptTuning"]


class PromptTuning(PromptMethod):
    """Inserts trained token embeddings into the input (Lester et al. 2021, arXiv:2104.08691).

    Outputs, labels, masks and generated tokens keep their lengths. In a causal model, the output at a token is the
    prediction of the next real token, made after any virtual tokens in between.

    Hugging Face classifiers that pool the first position, in the encoder (BERT) or in the head (RoBERTa), pool the
    first virtual token if ``position="prefix"``. Classifiers that pool the mean include the virtual tokens. Hugging
    Face PEFT does the same. ``"after_bos"`` keeps the first real token first, and ``targets="roberta"`` (the encoder's
    name) keeps virtual tokens out of the head.

    A suffix follows the text of the first ``generate`` step, so it needs the KV cache (``use_cache=True``, the default
    of most models). Generating without a cache is an error. For a separate prompt in every layer use
    :class:`lightning_peft.PrefixTuning`.

    Choose it for large models and many tasks: each task needs T d parameters, and one batch can mix tasks. It costs T
    positions of the context and their compute in every layer, cannot be merged, and works poorly on small models. It
    needs a high learning rate (0.3 with Adafactor in the paper; 1e-2 with AdamW).

    Args:
        init: ``"vocab"`` (embeddings of random tokens), ``"random"`` (uniform between -0.5 and 0.5), ``"text"``
            (embeddings of ``init_text``, repeated or truncated), or ``"labels"`` (the mean embedding of each class name
            in ``init_text``, then random tokens).
        init_text: the text for ``init="text"``, or the list of class names for ``init="labels"``.
        tokenizer: the model's tokenizer for ``init_text``: its folder, its hub id, or ``"demo"``.

    Raises:
        ValueError: if an argument is invalid, or init_text is given without a tokenizer.
        TargetError: if no module or several modules take a token sequence, or there are more virtual tokens than
            positions.

    Example::

        trainer = L.Trainer(callbacks=[lp.PromptTuning(20, init="text", init_text="Is it good?", tokenizer="gpt2")])
    """

    parameter_count = "T d"
    resume_may_differ = PEFTMethod.resume_may_differ | {"init", "init_text", "tokenizer"}

    init: Literal["vocab", "random", "text", "labels"] = "vocab"
    tokenizer: str | None = None
    init_text: str | Sequence[str] | None = field(default=None, converter=as_list)

    def check(self) -> None:
        super().check()
        text = self.init_text
        if self.init in ("text", "labels"):
            if not text or isinstance(text, str) != (self.init == "text"):
                kind = "a string" if self.init == "text" else "a list of class names"
                raise ValueError(f"init_text must be {kind} for init={self.init!r}, got {text!r}")
            if self.tokenizer is None:
                raise ValueError(
                    f"init={self.init!r} needs a tokenizer: set tokenizer to the folder or hub id of the "
                    "model's tokenizer"
                )
        elif text is not None:
            raise ValueError(
                f"init_text has no effect with init={self.init!r}: set init='text' or init='labels', or "
                "remove init_text"
            )

    def build(self, name: str, width: int, tokens: int, embedding: nn.Embedding | None) -> Tensor | nn.Module:
        if self.init == "random":
            return torch.rand(tokens, width) - 0.5
        if embedding is None or embedding.weight.is_meta:
            raise TargetError(
                f"init={self.init!r} needs a token embedding of width {width} with loaded values, and none was found "
                f"for {name!r}: set init='random'"
            )
        table = embedding.weight.detach().to("cpu", torch.get_default_dtype())
        sampled = table[torch.randint(0, embedding.num_embeddings, (tokens,))]
        if self.init == "vocab":
            return sampled
        texts = [self.init_text] if isinstance(self.init_text, str) else self.init_text or []
        ids = _tokenize(texts, str(self.tokenizer), embedding.num_embeddings)
        if self.init == "text":
            return table[(ids[0] * tokens)[:tokens]].clone()
        if len(ids) > tokens:
            raise ValueError(
                f"init_text has {len(ids)} class names, but there are only {tokens} virtual tokens: raise "
                "num_virtual_tokens"
            )
        return torch.cat([torch.stack([table[i].mean(0) for i in ids]), sampled[len(ids) :]])


def _tokenize(texts: Sequence[str], name: str, vocabulary: int) -> list[list[int]]:
    ids = load_tokenizer(name)(list(texts), add_special_tokens=False)["input_ids"]
    for text, row in zip(texts, ids):
        if not row:
            raise ValueError(f"init_text: the tokenizer returns no token for {text!r}. Use another text")
        if max(row) >= vocabulary:
            raise ValueError(
                f"tokenizer={name!r} does not fit the model: it returns id {max(row)}, but the embedding has "
                f"{vocabulary} entries. Use the model's own tokenizer"
            )
    return ids
