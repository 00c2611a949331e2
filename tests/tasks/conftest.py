"""Tiny Hugging Face folders, made on the spot."""

import pytest

from lightning_peft import demo


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A causal model's folder, with the demo's tokenizer and random weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(folder)
    return str(folder)
