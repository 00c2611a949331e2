"""Prompt tuning: trained embeddings among those of the input.

    E' = [P; E],    P in R^{T x d}

T d parameters train, once for the whole model. The base sees T tokens more; the user does not: outputs, labels and
masks keep their lengths.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.frozen import in_frozen_part, why_frozen
from lightning_peft.core.optional import config_value
from lightning_peft.core.plan import Plan
from lightning_peft.core.swap import original_class
from lightning_peft.core.targets import TargetError, as_patterns, base_modules, match, match_modules, no_match
from lightning_peft.core.tokens import Placement
from lightning_peft.formats.pretrained import load_tokenizer
from lightning_peft.methods.callback import PEFTMethod, one_of, positive_int
from lightning_peft.methods.sequence import PromptAdapter, PromptLabels, PromptMask, PromptStrip
from lightning_peft.methods.token_hosts import (
    around,
    batch_first,
    is_causal,
    position_limit,
    token_models,
    token_width,
)

__all__ = ["PromptMethod", "PromptTuning"]

_POSITIONS = {"prefix": "v{} x*", "after_bos": "x1 v{} x*", "suffix": "x* v{}"}


class PromptMethod(PEFTMethod):
    """Base class of the methods that put virtual tokens among the input's; a subclass gives :meth:`build`."""

    num_virtual_tokens: int | None
    position: str
    template: str | None
    side: str

    def build(self, name: str, width: int, tokens: int, embedding: nn.Embedding | None) -> Tensor | nn.Module:
        """The virtual tokens' start (tokens, width), or a module that returns them.

        Args:
            name: the module that gets them.
            width: of a token's embedding.
            tokens: how many there are.
            embedding: the base's token embedding, None where there is none to tell.
        """
        raise NotImplementedError

    def placement(self) -> Placement:
        """Where the virtual tokens stand."""
        return Placement.parse(self.template or _POSITIONS[self.position].format(self.num_virtual_tokens or 20))

    def _place(
        self, num_virtual_tokens: int | None, position: str, template: str | None, side: str = "encoder"
    ) -> None:
        one_of("position", position, tuple(_POSITIONS))
        one_of("side", side, ("encoder", "decoder"))
        if num_virtual_tokens is not None:
            positive_int("num_virtual_tokens", num_virtual_tokens)
        if template is not None and num_virtual_tokens not in (None, Placement.parse(template).tokens):
            raise ValueError(
                f"num_virtual_tokens={num_virtual_tokens}, but template={template!r} has "
                f"{Placement.parse(template).tokens}: leave num_virtual_tokens out"
            )
        self.num_virtual_tokens = num_virtual_tokens
        self.position = position
        self.template = template
        self.side = side

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        placement = self.placement()
        name, other = self.find(model)
        host: Any = model.get_submodule(name)
        tokens = name in token_models(model)
        embedding = host.get_input_embeddings() if tokens else None
        if embedding is not None and not isinstance(embedding, nn.Embedding):
            raise TargetError(f"the input embedding of {name!r} is a {type(embedding).__name__}, not an nn.Embedding")
        width = embedding.embedding_dim if embedding is not None else token_width(name, host)
        if embedding is None:
            found = [m for _, m in base_modules(model) if isinstance(m, nn.Embedding) and m.embedding_dim == width]
            embedding = max(found, key=lambda m: m.num_embeddings, default=None)
        limit = position_limit(host) if tokens else None
        allowed = limit or config_value(getattr(host, "config", None), "max_position_embeddings")
        if tokens and isinstance(allowed, int) and placement.tokens >= allowed:
            raise TargetError(
                f"{placement.tokens} virtual tokens leave no room for a text: {name!r} "
                f"({original_class(host).__name__}) has {allowed} positions; lower num_virtual_tokens"
            )
        encodes = other is not None and self.side == "encoder"
        labelled = around(model, name, "labels") if tokens and other is None else []
        generating = [n for n in labelled if _generates(model.get_submodule(n))]
        with self.initialising(name):
            adapter = PromptAdapter(
                self.build(name, width, placement.tokens, embedding),
                placement,
                limit=limit,
                shorten=not encodes,
                causal=tokens and (is_causal(host) or bool(generating)),
                batch_first=batch_first(host),
            )
        what = f"prompt of {placement.tokens} x {width} on {original_class(host).__name__}"
        plan.attach.append((name, name, adapter, what))
        if encodes:
            assert other is not None
            plan.attach.append((other, other, PromptMask(placement), "sees the encoder's virtual tokens"))
            parents = [n for n in around(model, name) if other.startswith(f"{n}." if n else "")]
            plan.attach.append((parents[-1], parents[-1], PromptStrip(placement), "output keeps its length"))
        plan.attach += [(n, n, PromptLabels(adapter), "labels of virtual tokens are -100") for n in generating[-1:]]
        return plan

    def find(self, model: nn.Module) -> tuple[str, str | None]:
        """The names of the module that gets the prompt, and of the decoder (or encoder) beside it.

        Raises:
            TargetError: there is none, or several.
        """
        left_alone = in_frozen_part(model)
        models = {name: module for name, module in token_models(model).items() if not left_alone(name)}
        patterns = as_patterns(self.targets, "targets")
        if patterns != ("inputs",):
            modules = {n: m for n, m in base_modules(model) if n}
            for pattern in patterns:
                if not any(match(pattern, n, m) for n, m in modules.items()):
                    raise TargetError(f"targets: {no_match(pattern, modules)}")
            names = list(match_modules(model, patterns, "targets"))
            names = [n for n in names if n not in match_modules(model, as_patterns(self.exclude, "exclude"), "exclude")]
            if len(names) != 1:
                raise TargetError(f"targets={self.targets!r} matches {names[:4]}; a prompt goes into one: name one")
            return names[0], None
        if len(models) == 1:
            return next(iter(models)), None
        if len(models) == 2:
            sides = {n.rpartition(".")[2]: n for n in models}
            if sides.keys() == {"encoder", "decoder"}:
                return sides[self.side], sides["decoder" if self.side == "encoder" else "encoder"]
        if models:
            raise TargetError(f"targets='inputs' finds several token sequences, {list(models)}: name one of them")
        raise TargetError(
            "targets='inputs' finds no module that takes inputs_embeds; name in targets the module that takes and "
            "returns the sequence of embeddings (batch, length, width), one of "
            f"{[n for n, _ in base_modules(model) if n][:8]}{why_frozen(model)}"
        )


class PromptTuning(PromptMethod):
    """Trained embeddings among those of the input (Lester et al. 2021, arXiv:2104.08691).

    Outputs, labels, masks and generated tokens keep the user's lengths. In a causal model the output at a token is the
    one that predicts the next, after any virtual tokens between the two. In a classifier that pools its first
    position (BERT) ``position="prefix"`` pools the first virtual token, as Hugging Face PEFT does; ``"after_bos"``
    leaves the first token where it was. A suffix stands after the text that the first step of ``generate`` sees, so it
    needs the KV cache (``use_cache=True``, the default). For a fresh prompt in every layer use
    :class:`lightning_peft.PrefixTuning`.

    Choose it for large models and many tasks: T d parameters a task, and rows of different tasks differ in data
    only. It costs T positions of the context and their compute in every layer, cannot be merged, and is weak on
    small models. It needs a high learning rate (0.3 with Adafactor in the paper; 1e-2 with AdamW).

    Args:
        num_virtual_tokens: T; 20 by default.
        targets: ``"inputs"`` finds the module that embeds tokens, or a pattern for the one module that takes the
            sequence (see :mod:`lightning_peft.methods.sequence`).
        exclude, trainable, name: see :class:`lightning_peft.PEFTMethod`.
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
        **options: ``seed``, ``adapter_dtype``, ``train_norm_stats``, ``audit`` of
            :class:`lightning_peft.PEFTMethod`.

    Raises:
        ValueError: an argument that cannot be; a text without a tokenizer.
        TargetError: no module that takes a token sequence, or several; more virtual tokens than positions.

    Example::

        trainer = L.Trainer(callbacks=[lp.PromptTuning(20, init="text", init_text="Is it good?", tokenizer="gpt2")])
    """

    may_change = PEFTMethod.may_change | {"init", "init_text", "tokenizer"}

    def __init__(
        self,
        num_virtual_tokens: int | None = None,
        targets: str | Sequence[str] = "inputs",
        exclude: str | Sequence[str] = (),
        trainable: str | Sequence[str] = (),
        name: str = "default",
        position: Literal["prefix", "after_bos", "suffix"] = "prefix",
        template: str | None = None,
        side: Literal["encoder", "decoder"] = "encoder",
        init: Literal["vocab", "random", "text", "labels"] = "vocab",
        init_text: str | Sequence[str] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, trainable=trainable, name=name, **options)
        self._place(num_virtual_tokens, position, template, side)
        one_of("init", init, ("vocab", "random", "text", "labels"))
        if init in ("text", "labels"):
            if not init_text or isinstance(init_text, str) != (init == "text"):
                kind = "a string" if init == "text" else "a list of class names"
                raise ValueError(f"init={init!r} needs init_text, {kind}, got {init_text!r}")
            if tokenizer is None:
                raise ValueError(f"init={init!r} needs tokenizer=, the folder or hub id of the model's tokenizer")
        elif init_text is not None:
            raise ValueError(f"init_text is only used with init='text' or 'labels', not with init={init!r}")
        self.init = init
        self.init_text = init_text if init_text is None or isinstance(init_text, str) else list(init_text)
        self.tokenizer = tokenizer

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


def _generates(module: Any) -> bool:
    return callable(getattr(module, "can_generate", None)) and bool(module.can_generate())
