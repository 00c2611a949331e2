"""Saving is tried out when methods are applied and when a fit starts, so that errors do not appear after training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.formats.directory import files
from lightning_peft.formats.save import try_writing
from lightning_peft.trainer import saving_trial
from tests.helpers import assert_same_bits, bits
from tests.trainer.toys import Toy, loader, lora, trainer


class Scheduled(lp.LoRA):
    """A user's method with an argument that is not a plain value."""

    def __init__(self, schedule=None, **options):
        super().__init__(**options)
        self.schedule = schedule


class Module(Toy):
    steps = 0

    def training_step(self, *args):
        self.steps += 1
        return super().training_step(*args)


def failing(*args, **kwargs):
    raise NotImplementedError("no answer")


def test_apply_refuses_a_method_with_arguments_that_json_cannot_represent():
    model = Toy()
    before = bits(model)
    with pytest.raises(
        lp.InjectionError, match=r"could not save Scheduled 'default' after training: .*JSON cannot represent"
    ):
        lp.apply(model, Scheduled(len))
    assert_same_bits(bits(model), before)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="could not save"):
        lp.apply(model, Scheduled(len, audit="warn"))


def test_the_checkpoint_of_such_a_method_is_refused_when_the_fit_starts(tmp_path):
    module = Module()
    run = trainer(tmp_path, method=Scheduled(len, audit="off"), enable_checkpointing=True)
    with pytest.raises(lp.StateError, match="Scheduled 'default': its argument schedule is a builtin"):
        run.fit(module, loader())
    assert module.steps == 0


@pytest.mark.parametrize("level", ["error", "warn", "off"])
def test_errors_of_save_adapter_appear_when_the_fit_starts(tmp_path, monkeypatch, level):
    module = Module()
    lp.apply(module, method := lora(audit=level))
    monkeypatch.setattr("lightning_peft.formats.directory.snapshot.base_of", failing)
    with pytest.raises(NotImplementedError):
        lp.save_adapter(module, tmp_path / "adapter")
    run = trainer(tmp_path, method=method, max_steps=1)
    if level == "error":
        with pytest.raises(lp.AuditError, match=r"could not save LoRA 'default' after training: .*no answer"):
            run.fit(module, loader())
        assert module.steps == 0
    elif level == "warn":
        with pytest.warns(UserWarning, match="could not save LoRA"):
            run.fit(module, loader())
    else:
        run.fit(module, loader())


def test_the_trial_writes_and_copies_nothing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    lp.apply(model, lp.LoRA(r=2, trainable=["1"], targets="0"))
    with torch.no_grad():  # values are checked only when they are saved
        model[0].adapters["default"].lora_A.fill_(float("nan"))
    monkeypatch.setattr(files, "save_file", failing)
    assert try_writing(model, "default") is None
    with pytest.raises(lp.FormatError, match="NaN"):
        lp.save_adapter(model, tmp_path)


def test_a_note_says_why_peft_cannot_read_an_adapter(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(saving_trial, "rank_zero_info", notes.append)
    trainer(tmp_path, method=lp.LoHa(r=2, targets="type:Linear", use_effective_conv2d=False), max_steps=1).fit(
        Toy(), loader()
    )
    assert not notes
    model = Toy()
    method = lp.OFT(block_size=2, num_cayley_neumann_terms=3, use_cayley_neumann=True)
    trainer(tmp_path, method=method, max_steps=1).fit(model, loader())
    lp.save_adapter(model, tmp_path / "a")
    reason = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["reason"]
    assert len(notes) == 1
    assert notes[0].endswith(reason)
