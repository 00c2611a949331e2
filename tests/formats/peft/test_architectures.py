"""LoRA and VeRA of every linear layer, exchanged with PEFT both ways over architectures of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files
from tests.formats.models import adapted, made_by_peft, moved, read_by_peft

DOCS = Path(__file__).parents[3] / "docs"
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
OPT = {**SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", WIDE),
    "Mistral": ("ForCausalLM", {**WIDE, "num_key_value_heads": 2}),
    "Gemma": ("ForCausalLM", {**WIDE, "head_dim": 8, "num_key_value_heads": 4, "pad_token_id": 0}),
    "Qwen2": ("ForCausalLM", {**WIDE, "num_key_value_heads": 2}),
    "Phi": ("ForCausalLM", WIDE),
    "OPT": ("ForCausalLM", OPT),
    "Bloom": ("ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
    "Falcon": ("ForCausalLM", SIZES),
    "GPT2": ("LMHeadModel", GPT),
    "GPTJ": ("ForCausalLM", {**GPT, "rotary_dim": 4}),
    "GPTNeoX": ("ForCausalLM", WIDE),
    "Bert": ("ForSequenceClassification", WIDE),
    "T5": ("ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "Bart": ("ForConditionalGeneration", BART),
    "ViT": ("Model", {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8}),
}


def build(name: str) -> nn.Module:
    kind, sizes = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    return moved(getattr(transformers, f"{name}{kind}")(config))


@torch.no_grad()
def output(model: nn.Module, base: nn.Module) -> Tensor:
    torch.manual_seed(3)
    if base.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 16, 16)).last_hidden_state
    ids = torch.randint(3, 64, (2, 6))
    more = {"decoder_input_ids": ids[:, :4]} if base.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("method", ["LORA", "VERA"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_both_ways(name, method, tmp_path):
    base = build(name)
    ours = adapted(base, lp.LoRA(2) if method == "LORA" else lp.VeRA(4))
    lp.save_adapter(ours, tmp_path / "ours")
    assert read_files(tmp_path / "ours").config["peft_type"] == method
    close(output(read_by_peft(base, tmp_path / "ours"), base), output(ours, base))

    kind = peft.LoraConfig(r=2, target_modules="all-linear")
    config = kind if method == "LORA" else peft.VeraConfig(r=4, target_modules="all-linear")
    theirs = made_by_peft(base, config, tmp_path / "theirs").eval()
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    close(output(here, base), output(theirs, base))


def test_the_documentation_names_them():
    listed = ", ".join(ARCHITECTURES)
    assert f"Tested both ways over {listed}." in " ".join((DOCS / "adapters.md").read_text().split())
