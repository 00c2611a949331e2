"""A directory identifies the base of its adapter, even if weights were loaded after the method was applied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.formats.checkpoint import export_checkpoint
from tests.formats.models import bert, gpt2, logits, moved, tokens
from tests.formats.test_checkpoint import Trained, train

METHODS = {
    "all": lambda: lp.LoRA(r=2),
    "one": lambda: lp.LoRA(r=2, targets="h.1.attn.c_attn"),
    "prefixes": lambda: lp.PrefixTuning(2),
    "prompts": lambda: lp.PromptTuning(2),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_directory_fits_the_base_that_was_loaded_last(method, tmp_path):
    old, new, x = gpt2(), gpt2(), tokens()
    model = copy.deepcopy(old)
    lp.apply(model, METHODS[method]())
    nn.Module.load_state_dict(model, new.state_dict(), strict=False)
    moved(model)
    lp.save_adapter(model, tmp_path)
    with pytest.raises(lp.StateError, match="different base"):
        lp.load_adapter(old, tmp_path)
    lp.load_adapter(new, tmp_path)
    torch.testing.assert_close(logits(new, x), logits(model, x))


def test_an_updated_teacher_does_not_count_as_another_base(tmp_path):
    base = nn.ModuleDict({"net": nn.Linear(4, 3), "teacher": nn.Linear(4, 3)})
    model = copy.deepcopy(base)
    lp.apply(model, lp.LoRA(r=2, targets="net"))
    with torch.no_grad():
        model["teacher"].weight.add_(1)
    lp.save_adapter(model, tmp_path)
    lp.load_adapter(base, tmp_path)


class Loading(Trained):
    """Applies the attached method, then loads other weights."""

    def configure_model(self):
        if not hasattr(self, "loaded"):
            lp.apply(self)
            self.loaded = True
            torch.manual_seed(9)
            nn.Module.load_state_dict(self.net, bert().state_dict(), strict=False)


def test_a_directory_made_from_a_checkpoint_identifies_the_base_too(tmp_path):
    module = Loading()
    export_checkpoint(train(module, lp.LoRA(r=2), steps=1), tmp_path)
    with pytest.raises(lp.StateError, match="different base"):
        lp.load_adapter(Trained(), tmp_path)
    lp.load_adapter(new := Trained(seed=9).eval(), tmp_path)
    x = tokens()
    torch.testing.assert_close(logits(new, x), logits(module.eval(), x))


def test_a_base_that_holds_infinity_is_saved_and_loaded(tmp_path):
    def base():
        model = nn.Sequential(nn.Linear(4, 3, bias=False))
        nn.init.ones_(model[0].weight)
        model.register_buffer("mask", torch.full((3,), -torch.inf))
        return model

    lp.apply(model := base(), lp.LoRA(r=2, targets="0"))
    lp.save_adapter(model, tmp_path)
    lp.load_adapter(base(), tmp_path)
