"""Write a plain LoRA as a GGUF file, which llama.cpp loads with ``--lora``.

Names, metadata and the order of rows are those of llama.cpp's ``convert_lora_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.core.state.atomic_file import writing
from lightning_peft.formats.deploy.plain_lora import MERGED, DeployError, PlainLoRA
from lightning_peft.formats.peft.converter import PREFIX

__all__ = ["write_lora"]

#: class of transformers -> name of the architecture in the gguf package. llama.cpp stores these weights unchanged,
#: except for the order of the rows of queries and keys of LLAMA. It changes the weights of other architectures.
_ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
}


def write_lora(lora: PlainLoRA, model_class: str, config: Any, path: Path) -> None:
    """Write a LoRA as a GGUF file.

    Args:
        lora: the LoRA.
        model_class: the class of the base, such as ``LlamaForCausalLM``.
        config: the configuration of the base.
        path: the file.

    Raises:
        DeployError: if llama.cpp does not have the architecture, or does not adapt one of the weights.
    """
    import gguf

    if model_class not in _ARCHITECTURES:
        raise DeployError(
            f"a GGUF adapter for {model_class} is not supported: llama.cpp may store its weights in another form. "
            f"Supported are {', '.join(_ARCHITECTURES)}. {MERGED}, and convert it with convert_hf_to_gguf.py"
        )
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[model_class]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for weight, (a, b) in _factors(lora.tensors).items():
        name = names.get_name(f"{weight}.weight", try_suffixes=(".weight",))
        if name is None or (weight == "lm_head" and (config.tie_word_embeddings or "Gemma" in model_class)):
            raise DeployError(
                f"llama.cpp does not store {weight!r} of {model_class} as a separate weight. {MERGED}, or train "
                "without this target"
            )
        if architecture == gguf.MODEL_ARCH.LLAMA and weight.endswith(("q_proj", "k_proj")):
            b = _rotary_order(
                b, config.num_attention_heads if weight.endswith("q_proj") else config.num_key_value_heads
            )
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    with writing(path):
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.config["lora_alpha"]))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the adapted layer.

    Raises:
        DeployError: if there are other tensors.
    """
    found = {}
    ends = (".lora_A.weight", ".lora_B.weight")
    for key, tensor in tensors.items():
        if not key.endswith(ends) or tensor.ndim != 2:
            raise DeployError(
                f"llama.cpp cannot load {key!r}: this export writes factors of linear layers only. {MERGED}"
            )
        if key.endswith(ends[0]):
            layer = key.removesuffix(ends[0])
            found[layer.removeprefix(PREFIX)] = tensor, tensors[layer + ends[1]]
    return found


def _rotary_order(b: Tensor, heads: int) -> Tensor:
    """Reorder rows (heads * size, r): llama.cpp rotates neighbours, transformers the halves of each head."""
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
