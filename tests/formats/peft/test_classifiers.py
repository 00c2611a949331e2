"""Prompts of classifiers with any pooling are exchanged with PEFT both ways, and the logits agree."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files
from tests.formats.models import adapted, close, made_by_peft, moved, read_by_peft

#: model -> arguments of its configuration in addition to the common ones
MODELS: dict[str, dict] = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {},
    "Electra": {"embedding_size": 16},
    "DistilBert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p"], "position_buckets": 8},
    "ModernBert": {"classifier_pooling": "cls", "local_attention": 32},
    "ModernBert-mean": {"classifier_pooling": "mean", "local_attention": 32},
    "Albert": {"embedding_size": 16},
}


def build(name: str) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    more = {"num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0}
    kind = name.partition("-")[0]
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, **MODELS[name])
    return moved(getattr(transformers, f"{kind}ForSequenceClassification")(config))


def batch() -> dict[str, Tensor]:
    """A batch that is padded on the right."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": torch.randint(3, 64, (3, 7)), "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return model(**x).logits


@pytest.mark.parametrize("name", MODELS)
def test_prompts_both_ways(name, tmp_path):
    base, x = build(name), batch()
    sizes = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2} if name == "DistilBert" else {}
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS", **sizes)
    theirs = made_by_peft(base, config, tmp_path / "theirs").eval()
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    close(logits(here, x), logits(theirs, x))
    assert not torch.allclose(logits(here, x), logits(base, x), atol=1e-3)

    ours = adapted(base, lp.PromptTuning(3, trainable=["classifier"]))
    lp.save_adapter(ours, tmp_path / "ours")
    assert read_files(tmp_path / "ours").config["peft_type"] == "PROMPT_TUNING"
    close(logits(read_by_peft(base, tmp_path / "ours"), x), logits(ours, x))


def test_the_rows_of_a_batch_have_a_prompt_each():
    base, x = build("Roberta"), batch()
    model = adapted(base, lp.PromptTuning(3, name="a"), lp.PromptTuning(2, name="b"))
    expected = []
    for name in ("a", "b", None):
        with lp.active(model, name) if name else lp.disabled(model):
            expected.append(logits(model, x))
    with lp.rows(model, ["a", "b", None]):
        got = logits(model, x)
    close(got, torch.stack([one[i] for i, one in enumerate(expected)]))


def test_a_sequence_of_outputs_keeps_its_length():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    x = batch()
    for kind in ("TokenClassification", "QuestionAnswering", "MaskedLM"):
        model = getattr(transformers, f"RobertaFor{kind}")(config).eval()
        before = [value.shape for value in model(**x).values()]
        lp.apply(model, lp.PromptTuning(3))
        assert [value.shape for value in model(**x).values()] == before


def test_the_named_encoder_alone_has_virtual_tokens(tmp_path):
    """Its head reads the first real token, unlike PEFT's, so it is saved in this package's own format."""
    base, x = build("Roberta"), batch()
    ours = adapted(base, lp.PromptTuning(3, targets="roberta"))
    with torch.no_grad():
        hidden = ours.roberta(**x).last_hidden_state
        assert hidden.shape[:2] == (3, 7)
        close(logits(ours, x), ours.classifier(hidden))
    lp.save_adapter(ours, tmp_path)
    assert "targets='roberta'" in read_files(tmp_path).config["reason"]
    lp.load_adapter(here := copy.deepcopy(base), tmp_path)
    close(logits(here, x), logits(ours, x))
