"""Visual prompt tuning: trained tokens are added to the patch tokens of a vision transformer.

    shallow:  [c, P, x] is the input of the first block; T d parameters
    deep:     [c, P_l, x] is the input of every block l; T d parameters per block

c are the leading tokens (CLS), x the patch tokens. Deep prompts replace the previous block's outputs at the prompt
positions. The prompts are removed after the last block.

Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.module_io import by_name
from lightning_peft.core.names import is_within, leaf, owner_of
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.attention_sites import attention_sites
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.blocks import find_blocks
from lightning_peft.core.targeting.frozen_parts import why_frozen
from lightning_peft.core.targeting.patterns import TargetError, as_patterns, match_modules
from lightning_peft.core.targeting.token_modules import batch_first, token_width
from lightning_peft.methods.families.arguments import nonnegative_int, optional, positive_int, probability
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.methods.families.prompt_adapters import PromptAdapter, TokenError

__all__ = ["VisualPromptTuning"]

_LEADING = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token")


class VisualPromptTuning(PEFTMethod):
    """Adds trained tokens to the patch tokens of a vision transformer (Jia et al. 2022, arXiv:2203.12119).

    It works with any model whose blocks take and return patch tokens (batch, length, width): the ViTs of Hugging Face,
    timm and torchvision, or your own. The model's output keeps its length, but hidden states that the model collects
    between its blocks contain the prompts.

    Choose it for a frozen vision transformer and little data; ``deep=True`` is the better variant in the paper, and
    often comes close to full fine-tuning. It costs T more tokens in every block (the cost of attention grows
    quadratically), and cannot be merged.

    Args:
        num_virtual_tokens: number T of prompt tokens per block.
        deep: use new prompts in every block instead of only in the first.
        targets: ``"blocks"`` finds the repeated blocks; otherwise patterns of the blocks.
        leading_tokens: number of tokens before the prompts; None counts the model's CLS and distillation tokens
            (``num_prefix_tokens`` in timm).
        dropout: probability of zeroing an element of a prompt during training.

    Raises:
        ValueError: if an argument is out of range.
        TargetError: if the model has no blocks with attention, or several stacks of them.
        TokenError: at the first forward pass, if the blocks do not take (batch, length, width), as in windowed models.

    Example::

        trainer = L.Trainer(callbacks=[lp.VisualPromptTuning(50, deep=True, trainable=["head"])])
    """

    parameter_count = "T d, in one layer or in each"
    resume_may_differ = PEFTMethod.resume_may_differ | {"dropout"}

    num_virtual_tokens: int = field(default=50, validator=positive_int, kw_only=False)
    deep: bool = False
    targets: str | Sequence[str] = "blocks"
    leading_tokens: int | None = field(default=None, validator=optional(nonnegative_int))
    dropout: float = field(default=0.0, validator=probability)

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        blocks = self._blocks(model)
        leading = _leading(model) if self.leading_tokens is None else self.leading_tokens
        patch = _patch(model, [name for name, _ in blocks], token_width(*blocks[0]))
        for i, (name, block) in enumerate(blocks):
            width = token_width(name, block)
            prompt = None
            if self.deep or i == 0:
                # as in the paper: Xavier initialisation; the fans are the size of a patch and of a token
                bound = math.sqrt(6 / (patch + width))
                with self.seeded_init(name):
                    prompt = (2 * torch.rand(self.num_virtual_tokens, width) - 1) * bound
            elif i < len(blocks) - 1:
                continue
            adapter = BlockPrompt(
                prompt,
                self.num_virtual_tokens,
                leading,
                replaces=i > 0,
                removes=i == len(blocks) - 1,
                dropout=self.dropout,
                dim=1 if batch_first(block) else 0,
            )
            what = f"{self.num_virtual_tokens} prompts of {width}" if prompt is not None else "removes the prompts"
            plan.attach.append(Attachment(name, name, adapter, f"{what} on {original_class(block).__name__}"))
        return plan

    def _blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        blocks = find_blocks(model)
        if self.targets == "blocks":
            blocks = [(n, m) for n, m in blocks if attention_sites(m)]
            if not blocks:
                kinds = sorted({original_class(m).__name__ for _, m in base_modules(model)})
                raise TargetError(
                    f"targets='blocks' finds no repeated blocks with attention; the model has {kinds[:12]}. Name in "
                    f"targets the blocks that take (batch, length, width){why_frozen(model)}"
                )
        else:
            blocks = list(match_modules(model, as_patterns(self.targets, "targets"), "targets").items())
        gone = match_modules(model, as_patterns(self.exclude, "exclude"), "exclude")
        blocks = [(n, m) for n, m in blocks if n not in gone]
        stacks = list(dict.fromkeys(owner_of(n) for n, _ in blocks))
        if len(stacks) != 1:
            raise TargetError(
                f"the targeted blocks belong to several stacks, {stacks}, but prompts go into a single stack: name it, "
                f"for example targets='{(stacks or ['blocks'])[0]}.?'"
            )
        return blocks


class BlockPrompt(Adapter):
    """The prompts of one block: ``prompt`` (T, width), or None if it only removes the prompts from the output.

    Args:
        prompt: initial prompts.
        tokens: number T of prompt tokens.
        leading: number of tokens before the prompts.
        replaces: True if the input already contains prompts, which these replace.
        removes: True to remove the prompts from the output.
        dropout: dropout probability of the prompts.
        dim: sequence dimension of the input.
    """

    spans_hosts = True
    misfit_errors = (TokenError,)
    unscalable = PromptAdapter.unscalable

    def __init__(
        self,
        prompt: Tensor | None,
        tokens: int,
        leading: int,
        replaces: bool,
        removes: bool,
        dropout: float,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.prompt = None if prompt is None else nn.Parameter(prompt)
        self.tokens, self.leading, self.dropout, self.dim = tokens, leading, dropout, dim
        self.replaces, self.removes = replaces, removes

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        least = self.leading + (self.tokens if self.replaces else 0)
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[self.dim] < least:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TokenError(
                f"{original_class(host).__name__} was called with {got}: visual prompts need (batch, length, width) "
                f"with at least {least} tokens before the patches. Check targets and leading_tokens"
            )
        # the number of patches, with and without the tokens before them
        lengths = {x.shape[self.dim], x.shape[self.dim] - least}
        for name, value in by_name(host, args, kwargs).items():
            parts = value if isinstance(value, tuple) else (value,)
            with_length = [tuple(t.shape) for t in parts if isinstance(t, Tensor) and lengths & {*t.shape}]
            if with_length and re.search("mask|position|rotary|rope|key|memory", name):
                raise TokenError(
                    f"{original_class(host).__name__} was called with {name} of shape {with_length[0]}, which does not "
                    "cover the prompts: visual prompts support blocks whose only input is the patch tokens. Use "
                    "lp.PromptTuning or lp.PrefixTuning instead"
                )
        if self.prompt is not None:
            prompt = F.dropout(self.prompt, self.dropout, self.training).to(x.dtype).unsqueeze(1 - self.dim)
            shape = list(x.shape)
            shape[self.dim] = self.tokens
            front = x.narrow(self.dim, 0, self.leading)
            rest = x.narrow(self.dim, least, x.shape[self.dim] - least)
            x = torch.cat([front, prompt.expand(shape), rest], self.dim)
        if args:
            args = (x, *args[1:])
        else:
            kwargs = {**kwargs, next(iter(kwargs)): x}
        out = call(*args, **kwargs)
        if not self.removes:
            return out
        return self._without(out) if isinstance(out, Tensor) else (self._without(out[0]), *out[1:])

    def _without(self, x: Tensor) -> Tensor:
        end = self.leading + self.tokens
        return torch.cat(
            [x.narrow(self.dim, 0, self.leading), x.narrow(self.dim, end, x.shape[self.dim] - end)], self.dim
        )

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, leading={self.leading}, replaces={self.replaces}, removes={self.removes}"


def _leading(model: nn.Module) -> int:
    for _, module in base_modules(model):
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
            return count
    names = {leaf(name) for name, p in model.named_parameters() if p.numel()}
    registers = [
        p.shape[-2] for name, p in model.named_parameters() if name.endswith("register_tokens") and p.ndim == 3
    ]
    return sum(name in names for name in _LEADING) + sum(registers)


def _patch(model: nn.Module, blocks: list[str], width: int) -> int:
    """The number of values in a patch: the inputs that the patch embedding maps to one token.

    The patch embedding is a strided convolution, or a linear layer on patches that were extracted before it.
    """
    outside = [m for n, m in base_modules(model) if not is_within(owner_of(n), *blocks)]
    for module in outside:
        if isinstance(module, nn.modules.conv._ConvNd) and max(module.stride) > 1:
            return module.in_channels * math.prod(module.kernel_size)
    linear = (m.in_features for m in outside if isinstance(m, nn.Linear) and m.out_features == width)
    return next(linear, 0)
