"""Methods on every linear layer, or on the token sequence, exchanged with PEFT both ways over architectures.

The tests run LoRA and VeRA on all architectures, and each other method on some of them. For the complete table::

    EVERY_CELL=1 pytest tests/formats/peft/test_architectures.py
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
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
PATCHES = {"image_size": 16, "patch_size": 8}
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None}
WAV2VEC2 = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (4, 2), "num_conv_pos_embeddings": 4}
WAV2VEC2 |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "apply_spec_augment": False}
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
    "CLIP": ("Model", {"text_config": CLIP | WIDE, "vision_config": CLIP | PATCHES, "projection_dim": 16}),
    "Whisper": ("ForConditionalGeneration", WHISPER),
    "Wav2Vec2": ("Model", {**SIZES, **WAV2VEC2, "intermediate_size": 48}),
}
LINEAR: Any = {"target_modules": "all-linear"}
TOKENS: Any = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
METHODS: dict[str, tuple[Callable[[], lp.PEFTMethod], Callable[[], peft.PeftConfig]]] = {
    "LORA": (lambda: lp.LoRA(2), lambda: peft.LoraConfig(r=2, **LINEAR)),
    "VERA": (lambda: lp.VeRA(4), lambda: peft.VeraConfig(r=4, **LINEAR)),
    "IA3": (lambda: lp.IA3("all-linear"), lambda: peft.IA3Config(feedforward_modules=[], **LINEAR)),
    "LOHA": (lambda: lp.LoHa(2), lambda: peft.LoHaConfig(r=2, **LINEAR)),
    "LOKR": (lambda: lp.LoKr(2), lambda: peft.LoKrConfig(r=2, **LINEAR)),
    "OFT": (lambda: lp.OFT(block_size=4), lambda: peft.OFTConfig(r=0, oft_block_size=4, **LINEAR)),
    "ADALORA": (
        lambda: lp.AdaLoRA(init_r=3, target_r=2),
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **LINEAR),
    ),
    "PROMPT_TUNING": (lambda: lp.PromptTuning(3), lambda: peft.PromptTuningConfig(**TOKENS)),
    "P_TUNING": (lambda: lp.PTuning(3), lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **TOKENS)),
    "PREFIX_TUNING": (lambda: lp.PrefixTuning(3, shift_positions=True), lambda: peft.PrefixTuningConfig(**TOKENS)),
}


def build(name: str) -> nn.Module:
    kind, sizes = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    return moved(getattr(transformers, f"{name}{kind}")(config))


@torch.no_grad()
def output(model: nn.Module, base: Any) -> Tensor:
    torch.manual_seed(3)
    ids = torch.randint(3, 64, (2, 6))
    given: dict[str, Tensor] = {
        "pixel_values": torch.randn(2, 3, 16, 16),
        "input_features": torch.randn(2, 8, 16),
        "input_values": torch.randn(2, 160),
        "input_ids": ids,
    }
    inputs = {base.main_input_name: given[base.main_input_name]}
    if isinstance(base, transformers.CLIPModel):
        inputs["pixel_values"] = given["pixel_values"]
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    out = model(**inputs)
    return next(out[k] for k in ("logits", "logits_per_image", "last_hidden_state") if k in out)


def close(a: Tensor, b: Tensor) -> None:
    if a.ndim == 3:  # PEFT returns the positions of virtual tokens, too
        a, b = (t[:, -min(a.shape[1], b.shape[1]) :] for t in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


#: cells that PEFT cannot compute: GPT-2's Conv1D, and attention that its cache of prefixes does not fit
NOT_IN_PEFT = {("GPT2", "LOHA"), ("GPT2", "LOKR"), ("GPT2", "OFT"), ("Falcon", "PREFIX_TUNING")}
#: prefixes that shift positions: these models have distances (ALiBi) instead of positions
REFUSED = {("Bloom", "PREFIX_TUNING")}
CAUSAL = [name for name, (kind, _) in ARCHITECTURES.items() if kind in ("ForCausalLM", "LMHeadModel")]


def cells() -> list[tuple[str, str]]:
    """Architectures and methods: all that go together if ``EVERY_CELL`` is set, some of them otherwise."""
    found = []
    for i, method in enumerate(METHODS):
        names = CAUSAL if "TUNING" in method else list(ARCHITECTURES)
        some = names if i < 2 or os.environ.get("EVERY_CELL") else names[i % 6 :: 6]
        found += [(name, method) for name in some]
    return [cell for cell in found if cell not in NOT_IN_PEFT | REFUSED]


@pytest.mark.parametrize(("name", "method"), cells())
def test_both_ways(name, method, tmp_path):
    base, (our_method, their_config) = build(name), METHODS[method]
    ours = adapted(base, our_method())
    lp.save_adapter(ours, tmp_path / "ours")
    assert read_files(tmp_path / "ours").config["peft_type"] == method
    close(output(read_by_peft(base, tmp_path / "ours"), base), output(ours, base))

    theirs = made_by_peft(base, their_config(), tmp_path / "theirs").eval()
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    close(output(here, base), output(theirs, base))


@pytest.mark.parametrize("cell", sorted(NOT_IN_PEFT), ids="-".join)
def test_what_peft_cannot_compute(cell, tmp_path):
    base, (method, config) = build(cell[0]), METHODS[cell[1]]
    with pytest.raises((TypeError, RuntimeError)):
        output(made_by_peft(base, config(), tmp_path), base)
    output(ours := adapted(base, method()), base)
    assert lp.trainable_parameters(ours)


@pytest.mark.parametrize("cell", sorted(REFUSED), ids="-".join)
def test_what_is_refused(cell):
    with pytest.raises(lp.TargetError, match="no module around the attention takes position_ids"):
        adapted(build(cell[0]), METHODS[cell[1]][0]())


def test_the_documentation_names_them():
    *first, last = ARCHITECTURES
    text = " ".join((DOCS / "adapters.md").read_text().split())
    assert f"in both directions, for {', '.join(first)} and {last}:" in text
