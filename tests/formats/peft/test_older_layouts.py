"""Files with module names that transformers has renamed since, and targets that PEFT would rename."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files, write_files
from tests.formats.models import adapted, llama, logits, made_by_peft, moved, read_by_peft

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(**SMALL, vocab_size=64, initializer_range=0.2)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    return moved(transformers.LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("named_in_full", [False, True])
def test_the_language_model_of_llava_before_4_52(named_in_full, tmp_path):
    base, x = llava(), torch.randint(3, 59, (2, 6))
    made_by_peft(base, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=3), tmp_path)
    files, new, old = read_files(tmp_path), "model.language_model.", "language_model.model."
    tensors = {key.replace(new, old, 1): value for key, value in files.tensors.items() if new in key}
    rest = {key: value for key, value in files.tensors.items() if new not in key}
    assert tensors
    config = {**files.config}
    expected = logits(read_by_peft(base, tmp_path), x)
    if named_in_full:
        tower = [n for n, _ in base.named_modules() if n.endswith("q_proj") and new not in n]
        config["target_modules"] = [f"{old}layers.0.self_attn.q_proj", *tower]
    write_files(tmp_path, config, tensors | rest, {}, None)
    if not named_in_full:  # PEFT renames keys but not targets
        torch.testing.assert_close(logits(read_by_peft(base, tmp_path), x), expected)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(here, x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(base, x), atol=1e-3)


def deepseek() -> nn.Module:
    """A model with one dense layer and one layer of experts."""
    sizes = {**SMALL, "num_hidden_layers": 2, "vocab_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 4}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    more = {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = transformers.DeepseekV3Config(**sizes, **heads, **more, initializer_range=0.2)
    return moved(transformers.DeepseekV3ForCausalLM(config))


def test_dense_layers_that_peft_treats_as_experts(tmp_path):
    base, x = deepseek(), torch.randint(3, 64, (2, 6))
    ours = adapted(base, lp.LoRA(2, targets=["layers.0.mlp.up_proj"]))
    lp.save_adapter(ours, tmp_path / "dense")
    assert "as an expert of an older transformers release" in read_files(tmp_path / "dense").config["reason"]
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "dense")
    torch.testing.assert_close(logits(here, x), logits(ours, x))

    ours = adapted(base, lp.LoRA(2, targets=["o_proj"]))
    lp.save_adapter(ours, tmp_path / "attention")
    assert read_files(tmp_path / "attention").config["peft_type"] == "LORA"
    theirs = read_by_peft(base, tmp_path / "attention")
    torch.testing.assert_close(logits(theirs, x), logits(ours, x), rtol=1e-4, atol=1e-4)


def test_an_unknown_option_is_ignored_on_demand(tmp_path):
    base, x = llama(), torch.randint(3, 64, (2, 6))
    theirs = made_by_peft(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    files = read_files(tmp_path)
    write_files(tmp_path, {**files.config, "quantum": 3}, files.tensors, {}, None)
    with pytest.raises(lp.FormatError, match=r"unknown option quantum=3.*ignore_options=\['quantum'\]"):
        lp.load_adapter(copy.deepcopy(base), tmp_path)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path, ignore_options=["quantum"])
    torch.testing.assert_close(logits(here, x), logits(theirs, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_single_experts_of_mixtral_before_transformers_5(tmp_path):
    sizes = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": 2}
    base, x = moved(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))), torch.randint(3, 59, (2, 6))
    shapes = {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}
    tensors = {}
    for expert in range(2):
        for name, (inputs, outputs) in shapes.items():
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors |= {f"{key}.lora_A.weight": torch.randn(2, inputs), f"{key}.lora_B.weight": torch.randn(outputs, 2)}
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": [*shapes]}
    write_files(tmp_path / "old", options, tensors, {}, None)
    with pytest.raises(
        lp.FormatError, match=r"experts\.0\.w1.* belongs to a single expert.*Convert the file with peft"
    ):
        lp.load_adapter(copy.deepcopy(base), tmp_path / "old")

    theirs = read_by_peft(base, tmp_path / "old")  # as the error message says
    theirs.save_pretrained(tmp_path / "new")
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "new")
    torch.testing.assert_close(logits(here, x), logits(theirs, x))
    assert not torch.allclose(logits(here, x), logits(base, x))
