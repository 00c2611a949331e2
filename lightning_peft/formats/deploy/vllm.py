"""vLLM's rules for LoRA adapters, from the source of its ``PEFTHelper``, ``LoRAModel`` and ``LoRAConfig``.

vLLM checks some rules when it loads an adapter. It ignores other options, such as ``rank_pattern``, and then computes
different outputs. Adapters that break a rule are refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.formats.deploy.plain_lora import MERGED, DeployError

__all__ = ["MAX_RANK", "check_adapter", "server_rank"]

#: the values of vLLM's option ``--max-lora-rank``
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_RANK = SERVER_RANKS[-1]

#: option of ``adapter_config.json`` -> why vLLM does not load an adapter that has it
_OPTIONS = {
    "modules_to_save": "vLLM loads LoRA factors only, not modules that are trained in full",
    "use_dora": "vLLM does not implement DoRA",
    "lora_bias": "vLLM does not load biases of LoRA factors",
    "trainable_token_indices": "vLLM does not load trained token embeddings",
    "target_parameters": "vLLM adapts layers, not single parameters",
    "rank_pattern": "vLLM scales all weights by one rank",
    "alpha_pattern": "vLLM scales all weights by one alpha",
    "layer_replication": "vLLM does not replicate layers",
}
#: the embeddings that vLLM adapts
_EMBEDDINGS = ("embed_tokens", "lm_head")
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def check_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check that vLLM loads an adapter and computes the same with it.

    Args:
        config: the content of ``adapter_config.json``.
        tensors: the content of ``adapter_model.safetensors``.

    Raises:
        DeployError: if it does not; the message lists all reasons.
    """
    reasons = [f"{option}={config[option]!r}: {why}" for option, why in _OPTIONS.items() if config.get(option)]
    if config.get("peft_type") != "LORA":
        reasons.insert(0, f"peft_type={config.get('peft_type')!r}: vLLM loads LORA only")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r}: vLLM does not load biases")
    if isinstance(rank := config.get("r"), int) and rank > MAX_RANK:
        reasons.append(f"r={rank}: vLLM's largest rank is {MAX_RANK}")
    whole = "is a trained parameter of the base, and vLLM loads LoRA factors only"
    reasons += _failing(tensors, lambda key, _: key.endswith(_FACTORS), whole)
    reasons += _failing(tensors, lambda key, t: not key.endswith(_FACTORS) or t.ndim == 2, "is not a matrix")
    reasons += _failing(
        tensors,
        lambda key, _: "lora_embedding" not in key or key.split(".")[-2] in _EMBEDDINGS,
        f"is an embedding, and vLLM adapts only {' and '.join(_EMBEDDINGS)}",
    )
    if reasons:
        raise DeployError(f"vLLM cannot load this adapter: {'; '.join(reasons)}. {MERGED}")


def server_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` of vLLM for an adapter of this rank."""
    return next(each for each in SERVER_RANKS if each >= rank)


def _failing(tensors: Mapping[str, Tensor], holds: Callable[[str, Tensor], bool], what: str) -> list[str]:
    failing = [key for key, tensor in tensors.items() if not holds(key, tensor)]
    return [f"{failing[0]!r}{f' and {len(failing) - 1} more' if failing[1:] else ''} {what}"] if failing else []
