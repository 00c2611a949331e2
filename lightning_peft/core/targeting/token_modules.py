"""Find the modules that take a token sequence, where virtual tokens can be inserted, and their properties."""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.module_io import parameters_of
from lightning_peft.core.names import is_within, leaf, relative
from lightning_peft.core.optional import input_embedding
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.targeting.trial_forward import TRIAL_LENGTH, sources, try_forward

__all__ = [
    "batch_first",
    "enclosing_modules",
    "is_causal",
    "pooling_model",
    "position_limit",
    "token_models",
    "token_width",
]


def token_models(model: nn.Module) -> dict[str, nn.Module]:
    """Return the innermost modules that accept ``inputs_embeds`` and have an input embedding, by name."""
    found = {
        name: module
        for name, module in base_modules(model)
        if "inputs_embeds" in parameters_of(module) and input_embedding(module) is not None
    }
    return {n: m for n, m in found.items() if not any(o != n and is_within(o, n) for o in found)}


def enclosing_modules(model: nn.Module, inner: str, argument: str | None = None) -> list[str]:
    """Return the names of the modules around ``inner``, outermost first.

    If ``argument`` is given, only modules whose forward accepts it are returned.
    """
    parents = [name for name, _ in base_modules(model) if name != inner and is_within(inner, name)]
    return [name for name in parents if argument is None or argument in parameters_of(model.get_submodule(name))]


def pooling_model(model: nn.Module, inner: str) -> str | None:
    """Return the classifier around an encoder that pools the encoder's sequence itself, or None.

    RoBERTa's classifier does so: it reads the first position. None if the encoder pools inside (BERT), if the output
    is also a sequence, if the encoder is causal, or if no trial forward is possible.
    """
    encoder = model.get_submodule(inner)
    outer = [
        n for n in enclosing_modules(model, inner, "labels") if "inputs_embeds" in parameters_of(model.get_submodule(n))
    ]
    if not outer or is_causal(encoder):
        return None
    name = outer[-1]
    within = relative(inner, name)
    made: dict[Node, str] = {}

    def remember(module: nn.Module, args: object, output: dict[str, object] | tuple[object, ...]) -> None:
        for value in output.values() if isinstance(output, dict) else output:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                made[value.grad_fn] = "sequence" if value.ndim == 3 else "pooled"

    def watch(twin: nn.Module) -> None:
        twin.get_submodule(within).register_forward_hook(remember)

    outputs = try_forward(model.get_submodule(name), watch)
    if not outputs or outputs[0].ndim != 2 or outputs[0].shape[1] == TRIAL_LENGTH:
        return None
    return name if sources(outputs[:1], made) == ["sequence"] else None


def position_limit(module: nn.Module) -> int | None:
    """Return the number of positions in the module's own position embedding; None if it does not have one."""
    for name, child in module.named_modules():
        last = leaf(name)
        if isinstance(child, nn.Embedding) and (last == "wpe" or ("position" in last and "relative" not in last)):
            reserved = child.padding_idx + 1 if child.padding_idx is not None else int(getattr(child, "offset", 0))
            return child.num_embeddings - reserved
    return None


def is_causal(module: nn.Module) -> bool:
    """Whether an attribute of ``module`` or its submodules says that its attention is causal."""
    return any(
        getattr(m, "is_causal", False) is True or getattr(m, "is_decoder", False) is True for m in module.modules()
    )


def token_width(name: str, module: nn.Module) -> int:
    """Return the width of the tokens that ``module`` takes, read from its first attention, norm or linear layer.

    Raises:
        TargetError: if it has none of these layers.
    """
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention):
            return child.embed_dim
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            return weight.shape[0]
        if isinstance(child, nn.Linear):
            return child.in_features
    raise TargetError(
        f"the token width of {name!r} ({original_class(module).__name__}) cannot be determined, because it has no "
        "attention, norm or linear layer. Target a module that has one"
    )


def batch_first(module: nn.Module) -> bool:
    """Whether ``module`` takes (batch, length, width); torch's transformer layers may take (length, batch, width)."""
    return all(m.batch_first for m in module.modules() if isinstance(m, nn.MultiheadAttention))
