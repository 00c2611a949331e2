"""Exchange norm tuning with PEFT, in both directions."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.files import read_files
from lightning_peft.formats.load import load_adapter
from lightning_peft.formats.save import save_adapter
from tests.formats import models
from tests.formats.models import adapted, logits, made_by_peft, moved, read_by_peft, tokens


def images() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(64, 6), nn.Flatten(), nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8),
        nn.Linear(8, 3),
    )  # fmt: skip


def build(name: str) -> nn.Module:
    model = images() if name == "images" else getattr(models, name)()
    model(tokens())
    return moved(model)


TARGETS = {"llama": ["input_layernorm", "norm"], "bert": ["LayerNorm"], "images": ["3", "5"]}


@pytest.mark.parametrize("model", list(TARGETS))
@pytest.mark.parametrize("parts", ["all", "weight"])
def test_ours_in_peft_and_back(model, parts, tmp_path):
    base, x = build(model), tokens()
    ours = adapted(base, lp.NormTuning(parts=parts))
    save_adapter(ours, tmp_path)
    config = read_files(tmp_path).config
    assert config["peft_type"] == "LN_TUNING"
    assert not config["modules_to_save"]
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path), x), logits(ours, x))
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)

    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x))
    with lp.disabled(again):
        torch.testing.assert_close(logits(again, x), logits(base, x))
    save_adapter(again, tmp_path / "again")
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path / "again"), x), logits(ours, x))


@pytest.mark.parametrize("model", list(TARGETS))
def test_peft_file_loads_here(model, tmp_path):
    base, x = build(model), tokens()
    theirs = made_by_peft(base, peft.LNTuningConfig(target_modules=TARGETS[model]), tmp_path)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path)
    torch.testing.assert_close(logits(here, x), logits(theirs, x))
    assert not torch.allclose(logits(here, x), logits(base, x), atol=1e-3)


def test_with_a_head(tmp_path):
    base, x = build("bert"), tokens()
    ours = adapted(base, lp.NormTuning(trainable=["classifier"]))
    save_adapter(ours, tmp_path)
    assert read_files(tmp_path).config["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path), x), logits(ours, x))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x))


def test_a_module_that_is_not_a_norm_layer(tmp_path):
    base = build("bert")
    made_by_peft(base, peft.LNTuningConfig(target_modules=["query"]), tmp_path)
    with pytest.raises(FormatError, match=r"query' \(Linear\) is not a norm layer"):
        load_adapter(base, tmp_path)
