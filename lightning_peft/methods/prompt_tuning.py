"""Prompt tuning: trained embeddings among those of the input.

    E' = [P; E],    P in R^{T x d}

T d parameters train, once for the whole model. The base sees T tokens more; the user does not: outputs, labels and
masks keep their lengths.

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
    """Trained embeddings among those of the input (Lester et al. 2021, arXiv:2104.08691).

    Outputs, labels, masks and generated tokens keep the user's lengths. In a causal model the output at a token is the
    one that predicts the next, after any virtual tokens between the two. A classifier of Hugging Face that pools its
    first position, in the encoder (BERT) or in its head (RoBERTa), pools the first virtual token with
    ``position="prefix"``, and one that pools the mean includes the virtual tokens, both as Hugging Face PEFT does.
    ``"after_bos"`` leaves the first token where it was; ``targets="roberta"``, the encoder's name, leaves its head
    without virtual tokens. A suffix stands after the text that the first step of ``generate`` sees, so it
    needs the KV cache (``use_cache=True``, the default of most models): generating without one is an error. For a fresh
    prompt in every layer use :class:`lightning_peft.PrefixTuning`.

    Choose it for large models and many tasks: T d parameters a task, and rows of different tasks differ in data
    only. It costs T positions of the context and their compute in every layer, cannot be merged, and is weak on
    small models. It needs a high learning rate (0.3 with Adafactor in the paper; 1e-2 with AdamW).

    Args:
        num_virtual_tokens: T; 20 by default.
        targets: ``"inputs"`` finds the module that embeds tokens, or a pattern for the one module that takes the
            sequence (see :mod:`lightning_peft.methods.families.prompt_adapters`).
        position: ``"prefix"``, ``"after_bos"`` (after the first token: learns faster where the base has always seen a
            BOS first) or ``"suffix"``, of the tokens that the attention mask keeps.
        template: any other place, as words: ``v8`` for eight virtual tokens, ``x1`` for one real, ``x*`` once for all
            other real ones: ``"v8 x1 v4 x*"``.
        side: of an encoder-decoder: ``"encoder"`` or ``"decoder"``.
        init: ``"vocab"`` (embeddings of random tokens), ``"random"`` (uniform in ±0.5), ``"text"`` (of ``init_text``,
            repeated or cut), or ``"labels"`` (the mean embedding of each class name in ``init_text``, then random
            tokens).
        init_text: the text, or the class names.
        tokenizer: of the model, for ``init_text``: its folder or hub id, or ``"demo"``.

    Raises:
        ValueError: an argument that cannot be; a text without a tokenizer.
        TargetError: no module that takes a token sequence, or several; more virtual tokens than positions.

    Example::

        trainer = L.Trainer(callbacks=[lp.PromptTuning(20, init="text", init_text="Is it good?", tokenizer="gpt2")])
    """

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
                raise ValueError(f"init={self.init!r} needs init_text, {kind}, got {text!r}")
            if self.tokenizer is None:
                raise ValueError(f"init={self.init!r} needs tokenizer=, the folder or hub id of the model's tokenizer")
        elif text is not None:
            raise ValueError(f"init_text is only used with init='text' or 'labels', not with init={self.init!r}")

    def build(self, name: str, width: int, tokens: int, embedding: nn.Embedding | None) -> Tensor | nn.Module:
        if self.init == "random":
            return torch.rand(tokens, width) - 0.5
        if embedding is None or embedding.weight.is_meta:
            raise TargetError(
                f"init={self.init!r} needs the token embedding, and {name!r} has none of width {width} with values: "
                "use init='random'"
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
            raise ValueError(f"init_text has {len(ids)} class names for {tokens} tokens: raise num_virtual_tokens")
        return torch.cat([torch.stack([table[i].mean(0) for i in ids]), sampled[len(ids) :]])


def _tokenize(texts: Sequence[str], name: str, vocabulary: int) -> list[list[int]]:
    ids = load_tokenizer(name)(list(texts), add_special_tokens=False)["input_ids"]
    for text, row in zip(texts, ids):
        if not row:
            raise ValueError(f"init_text: {text!r} has no token")
        if max(row) >= vocabulary:
            raise ValueError(f"tokenizer={name!r} is another model's: it gives id {max(row)} of {vocabulary}")
    return ids
