"""docs/migration.md: both versions of each module train the same from the same start, and write the same adapter."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import transformers
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import lightning_peft as lp

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "migration"
TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def language_model():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1)
    ids = torch.randint(0, 32, (6, 7))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def audio():
    config = transformers.Wav2Vec2Config(
        **TEXT,
        conv_dim=(8, 8),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        apply_spec_augment=False,
        layerdrop=0.0,
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout"), 0.0),
        final_dropout=0.0,
        initializer_range=0.3,
    )
    batch = {"input_values": torch.randn(6, 160), "labels": torch.tensor([0, 1, 0, 1, 1, 0])}
    return transformers.Wav2Vec2ForSequenceClassification(config), batch


def vision_language():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    words = torch.randint(0, 31, (6, 5))
    ids = torch.cat([torch.full((6, 4), 31), words], 1)  # an image of 2 x 2 patches before the words
    batch = {"input_ids": ids, "pixel_values": torch.randn(6, 3, 8, 8)}
    batch["labels"] = torch.cat([torch.full((6, 4), -100), words], 1)
    return transformers.LlavaForConditionalGeneration(config), batch


def embeddings():
    config = transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[::2, 5:] = 0
    batch = {
        name: {"input_ids": torch.randint(0, 32, (6, 7)), "attention_mask": mask.clone()}
        for name in ("query", "passage")
    }
    return transformers.BertModel(config), batch


PAIRS = {
    "language_model": (language_model, "LanguageModel", "model"),
    "audio": (audio, "AudioClassifier", "model"),
    "vision_language": (vision_language, "VisionLanguage", "model"),
    "embeddings": (embeddings, "Embedder", "encoder"),
}

OPTIONS = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}


def examples(batch, index):
    return {k: examples(v, index) if isinstance(v, dict) else v[index] for k, v in batch.items()}


@pytest.mark.parametrize("pair", PAIRS)
def test_before_and_after_train_the_same(pair, tmp_path):
    make, name, attribute = PAIRS[pair]
    before, after = (runpy.run_path(str(EXAMPLES / f"{pair}_{side}.py")) for side in ("before", "after"))
    model, batch = make()
    model.save_pretrained("base")
    data = DataLoader([examples(batch, i) for i in range(6)], batch_size=2)
    old, new = before[name](str(tmp_path / "base")), after[name](str(tmp_path / "base"))

    def trained(version, module):
        losses = []
        module.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"])
        version["train"](module, data, **OPTIONS)
        return torch.stack(losses), load_file("adapter/adapter_model.safetensors")

    # PEFT initialises A differently, so it gets this package's initial values.
    new.on_fit_start = lambda: lp.save_adapter(new, "start")
    losses, adapter = trained(after, new)
    set_peft_model_state_dict(getattr(old, attribute), load_file("start/adapter_model.safetensors"))
    losses_before, adapter_before = trained(before, old)

    torch.testing.assert_close(losses, losses_before)
    assert adapter.keys() == adapter_before.keys()
    for key, value in adapter.items():
        torch.testing.assert_close(value, adapter_before[key], msg=key)
    start = load_file("start/adapter_model.safetensors")
    assert all((adapter[key] - start[key]).abs().max() > 1e-3 for key in adapter)
