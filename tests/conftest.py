"""Settings for all tests: one thread each, so that parallel workers do not slow each other down, and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_global_state():
    """Every test starts from the same random stream and leaves torch's defaults as they were."""
    torch.manual_seed(1234)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    """Every test runs in its own folder, where it may leave files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A causal model's folder, with the demo's tokenizer and random weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from lightning_peft import demo

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(folder)
    return str(folder)
