"""Tests for all methods that insert virtual tokens into a token sequence."""

from __future__ import annotations

import pytest
from torch import nn

import lightning_peft as lp

TRANSFORMERS = pytest.importorskip("transformers")


def gemma4() -> nn.Module:
    """Each layer has its own embeddings, which are looked up by token id."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "global_head_dim": 8}
    config = TRANSFORMERS.Gemma4TextConfig(
        **sizes,
        vocab_size=32,
        vocab_size_per_layer_input=32,
        hidden_size_per_layer_input=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    return TRANSFORMERS.Gemma4ForCausalLM(config)


@pytest.mark.parametrize("method", [lp.PromptTuning, lp.PTuning])
def test_a_model_that_needs_the_token_ids_is_refused(method):
    model = gemma4()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(lp.TargetError, match=r"'model' .*runs with input_ids but not with inputs_embeds.*such as LoRA"):
        lp.apply(model, method(3))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    lp.apply(model, lp.LoRA(2))
