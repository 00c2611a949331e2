"""The base class of the methods that insert virtual tokens into a token sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.virtual_tokens import TokenTemplate
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.module_io import parameters_of
from lightning_peft.core.names import is_within, leaf
from lightning_peft.core.optional import config_value, input_embedding
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part, why_frozen
from lightning_peft.core.targeting.patterns import TargetError, as_patterns
from lightning_peft.core.targeting.selection import select
from lightning_peft.core.targeting.token_modules import (
    batch_first,
    enclosing_modules,
    is_causal,
    pooling_model,
    position_limit,
    token_models,
    token_width,
)
from lightning_peft.core.targeting.trial_forward import embeddings_problem
from lightning_peft.methods.families.arguments import optional, positive_int
from lightning_peft.methods.families.encoder_prompts import PromptMask, PromptStrip
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.methods.families.prompt_adapters import PromptAdapter, PromptLabels

__all__ = ["PromptMethod"]

_POSITIONS = {"prefix": "v{} x*", "after_bos": "x1 v{} x*", "suffix": "x* v{}"}


class PromptMethod(PEFTMethod):
    """Base class of the methods that insert virtual tokens into the input; a subclass implements :meth:`build`.

    Args:
        num_virtual_tokens: number T of virtual tokens; None means 20, or as many as ``template`` has.
        targets: ``"inputs"`` finds the module that embeds tokens; otherwise a pattern of the one module that takes the
            sequence (see :mod:`lightning_peft.methods.families.prompt_adapters`), or of a model around such a module.
        position: where to insert them among the tokens that the attention mask keeps: ``"prefix"``, ``"after_bos"``
            (after the first token; learns faster if the base was always given a BOS token first) or ``"suffix"``.
        template: any other arrangement, in words: ``v8`` for eight virtual tokens, ``x1`` for one real token, and
            ``x*`` once for all remaining real tokens. Example: ``"v8 x1 v4 x*"``.
        side: ``"encoder"`` or ``"decoder"`` of an encoder-decoder model.
    """

    num_virtual_tokens: int | None = field(default=None, validator=optional(positive_int), kw_only=False)
    targets: str | Sequence[str] = "inputs"
    position: Literal["prefix", "after_bos", "suffix"] = "prefix"
    template: str | None = None
    side: Literal["encoder", "decoder"] = "encoder"

    def check(self) -> None:
        if self.template is None:
            return
        tokens = TokenTemplate.parse(self.template).tokens
        if self.num_virtual_tokens not in (None, tokens):
            raise ValueError(
                f"num_virtual_tokens={self.num_virtual_tokens}, but template={self.template!r} has {tokens} virtual "
                "tokens: remove num_virtual_tokens"
            )

    def build(self, name: str, width: int, tokens: int, embedding: nn.Embedding | None) -> Tensor | nn.Module:
        """Return the initial virtual tokens (tokens, width), or a module that computes them.

        Args:
            name: name of the module that gets them.
            width: width of a token embedding.
            tokens: number of virtual tokens.
            embedding: the base's token embedding, or None if it cannot be determined.
        """
        raise NotImplementedError

    def token_template(self) -> TokenTemplate:
        """The positions of the virtual tokens in the sequence."""
        return TokenTemplate.parse(self.template or _POSITIONS[self.position].format(self.num_virtual_tokens or 20))

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        token_template = self.token_template()
        name, other = self.find(model)
        host: Any = model.get_submodule(name)
        tokens = "inputs_embeds" in parameters_of(host) and input_embedding(host) is not None
        embedding, width = _embedding(model, name, tokens)
        limit = _position_limit(name, host, token_template.tokens) if tokens else None
        encodes = other is not None and self.side == "encoder"
        labelled = enclosing_modules(model, name, "labels") if tokens and other is None else []
        generating = [n for n in labelled if _generates(model.get_submodule(n))]
        with self.seeded_init(name):
            adapter = PromptAdapter(
                self.build(name, width, token_template.tokens, embedding),
                token_template,
                limit=limit,
                shorten=not encodes,
                causal=tokens and (is_causal(host) or bool(generating)),
                batch_first=batch_first(host),
            )
        what = f"prompt of {token_template.tokens} x {width} on {original_class(host).__name__}"
        plan.attach.append(Attachment(name, name, adapter, what))
        if encodes:
            assert other is not None
            what = "sees the encoder's virtual tokens"
            plan.attach.append(Attachment(other, other, PromptMask(token_template), what))
            parents = [n for n in enclosing_modules(model, name) if is_within(other, n)]
            plan.attach.append(
                Attachment(parents[-1], parents[-1], PromptStrip(token_template), "output keeps its length")
            )
        what = "labels of virtual tokens are -100"
        plan.attach += [Attachment(n, n, PromptLabels(adapter), what) for n in generating[-1:]]
        return plan

    def find(self, model: nn.Module) -> tuple[str, str | None]:
        """The names of the module that gets the prompt and of its decoder (or encoder), if there is one.

        Raises:
            TargetError: if no module or several modules match.
        """
        models = token_models(model)
        if as_patterns(self.targets, "targets") == ("inputs",):
            left_alone = in_frozen_part(model)
            models = {name: module for name, module in models.items() if not left_alone(name)}
        else:
            names = list(select({n: m for n, m in base_modules(model) if n}, self.targets, self.exclude))
            if len(names) != 1:
                raise TargetError(
                    f"targets={self.targets!r} matches {names[:4]}, but a prompt is inserted into a single module: "
                    "name one of them"
                )
            # A head or a loss around the model that takes the tokens expects outputs of the caller's length.
            models = {name: module for name, module in models.items() if name != names[0] and is_within(name, names[0])}
            if not models:
                return names[0], None
        if len(models) == 1:
            (inner,) = models
            first = self.position == "prefix" and self.template is None
            outer = pooling_model(model, inner) if first else None
            return inner if outer is None else outer, None
        if len(models) == 2:
            sides = {leaf(n): n for n in models}
            if sides.keys() == {"encoder", "decoder"}:
                return sides[self.side], sides["decoder" if self.side == "encoder" else "encoder"]
        if models:
            raise TargetError(
                f"targets={self.targets!r} finds several modules that take tokens, {list(models)}: name one of them in "
                "targets"
            )
        raise TargetError(
            "targets='inputs' finds no module that takes inputs_embeds. Name in targets the module that takes and "
            "returns the sequence of embeddings (batch, length, width), one of "
            f"{[n for n, _ in base_modules(model) if n][:8]}{why_frozen(model)}"
        )


def _generates(module: Any) -> bool:
    return callable(getattr(module, "can_generate", None)) and bool(module.can_generate())


def _embedding(model: nn.Module, name: str, tokens: bool) -> tuple[nn.Embedding | None, int]:
    """The token embedding that initial values are taken from, if there is one, and the width of a token.

    Args:
        model: the model.
        name: the name of the module that gets the virtual tokens.
        tokens: whether that module takes token ids and embeds them itself.

    Raises:
        TargetError: the module needs the ids for something else too, or its embedding is not an ``nn.Embedding``.
    """
    host: Any = model.get_submodule(name)
    # otherwise the trial forward would also run the adapters already attached
    untouched = next(hosts(host), None) is None
    if tokens and untouched and (problem := embeddings_problem(host)) is not None:
        raise TargetError(
            f"{name!r} ({original_class(host).__name__}) runs with input_ids but not with inputs_embeds "
            f"({type(problem).__name__}): it also reads the ids for something else, as Gemma 4 does for its "
            "per-layer embeddings, but virtual tokens have no ids. Use a method that adapts weights, such as LoRA"
        )
    embedding = host.get_input_embeddings() if tokens else None
    if embedding is not None and not isinstance(embedding, nn.Embedding):
        raise TargetError(f"the input embedding of {name!r} is a {type(embedding).__name__}, not an nn.Embedding")
    width = embedding.embedding_dim if embedding is not None else token_width(name, host)
    if embedding is None:
        found = [m for _, m in base_modules(model) if isinstance(m, nn.Embedding) and m.embedding_dim == width]
        embedding = max(found, key=lambda m: m.num_embeddings, default=None)
    return embedding, width


def _position_limit(name: str, host: nn.Module, tokens: int) -> int | None:
    """The number of positions of ``host``, if the sequence must be shortened to it.

    Raises:
        TargetError: ``tokens`` virtual tokens leave no room for text.
    """
    limit = position_limit(host)
    allowed = limit or config_value(getattr(host, "config", None), "max_position_embeddings")
    if isinstance(allowed, int) and tokens >= allowed:
        raise TargetError(
            f"{tokens} virtual tokens leave no room for text: {name!r} "
            f"({original_class(host).__name__}) has {allowed} positions. Lower num_virtual_tokens"
        )
    return limit
