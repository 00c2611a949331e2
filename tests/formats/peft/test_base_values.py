"""Heads, biases and statistics saved with an adapter, compared with PEFT and together with other adapters."""

import copy

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.formats.models import Convolutions, adapted, bert, logits, made_by_peft, moved, read_by_peft, tokens


def test_a_head_is_read_by_peft_and_back(tmp_path):
    base, x = bert(), tokens()
    ours = adapted(base, lp.LoRA(r=2, targets=["query"], trainable=["classifier"]))
    lp.save_adapter(ours, tmp_path / "ours")
    theirs = read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, x), logits(ours, x))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = copy.deepcopy(base)
        lp.load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(logits(again, x), logits(ours, x))
        assert torch.equal(again.classifier.weight, base.classifier.weight)  # the base's own value is unchanged


def test_a_head_of_peft_with_its_task(tmp_path):
    base, x = bert(), tokens()
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["value"], r=2)
    theirs = made_by_peft(base, config, tmp_path)
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x))


def test_a_head_whose_name_is_the_end_of_anothers(tmp_path):
    base, x = Convolutions().eval(), tokens()
    ours = adapted(base, lp.LoRA(r=2, targets=["conv1", "inner.head"], trainable=["re:head"]))
    lp.save_adapter(ours, tmp_path)
    theirs = read_by_peft(base, tmp_path)
    torch.testing.assert_close(logits(theirs, x), logits(ours, x))
    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x))


def test_every_task_keeps_its_own_head_even_of_another_width(tmp_path):
    base, x = bert(), tokens()
    wide = copy.deepcopy(base)
    wide.classifier = nn.Linear(16, 5)
    wide.num_labels = 5
    five = adapted(wide, lp.LoRA(r=2, targets=["query"], trainable=["classifier"]))
    lp.save_adapter(five, tmp_path)
    model = adapted(base, lp.LoRA(r=2, targets=["value"], trainable=["classifier"], name="three"))
    before = logits(model, x)
    lp.load_adapter(model, tmp_path, name="five")
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=0)
    lp.set_active(model, "five")
    assert logits(model, x).shape == (2, 5)
    torch.testing.assert_close(logits(model, x), logits(five, x))
    lp.set_active(model, "three")
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=0)


def test_statistics_that_moved_are_saved_too(tmp_path):
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(16, 6)
    ours = copy.deepcopy(base)
    lp.apply(ours, lp.LoRA(r=2, targets=["0"], train_norm_stats=True))
    moved(ours).train()
    ours(x)
    ours.eval()
    lp.save_adapter(ours, tmp_path)
    theirs = read_by_peft(base, tmp_path)
    torch.testing.assert_close(logits(theirs, x), logits(ours, x))
    again = copy.deepcopy(base).eval()
    lp.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x))


def test_a_resized_vocabulary_is_named(tmp_path):
    base = bert()
    ours = adapted(base, lp.LoRA(r=2, targets=["query"], trainable=["word_embeddings"]))
    lp.save_adapter(ours, tmp_path)
    other = bert()
    other.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(lp.FormatError, match="resize_token_embeddings"):
        lp.load_adapter(other, tmp_path, check_base=False)


def test_a_second_copy_of_a_head(tmp_path):
    base, x = bert(), tokens()
    alone = {}
    for name in ("a", "b"):
        ours = adapted(base, lp.LoRA(r=2, targets=["query"], trainable=["classifier"], name=name))
        lp.save_adapter(ours, tmp_path / name)
        alone[name] = logits(ours, x)
    model = copy.deepcopy(base)
    lp.load_adapter(model, tmp_path)
    lp.load_adapter(model, tmp_path / "a", name="again")
    for name in ("a", "b", "again"):
        lp.set_active(model, name)
        torch.testing.assert_close(logits(model, x), alone[name[0]])
