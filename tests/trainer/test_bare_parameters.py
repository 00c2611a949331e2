"""Bare parameters of a module that also has submodules: trained by name, and named in a warning if they stay frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import bits
from tests.trainer import toys


class Temperature(toys.Toy):
    def build(self) -> None:
        super().build()
        self.logit_scale, self.query = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(1, 16))

    def forward(self, x):
        return super().forward(x + self.query) * self.logit_scale

    def configure_optimizers(self):
        layers = [*self.body.parameters(), *self.head.parameters()]
        return torch.optim.Adam([{"params": layers}, {"params": [self.logit_scale, self.query]}], 1e-2)


def moved(root, **options) -> set[str]:
    module = Temperature()
    before = bits(module)
    toys.trainer(root, method=toys.lora(**options), max_epochs=1).fit(module)
    return {key for key, value in before.items() if not torch.equal(value, module.state_dict()[key])}


def test_trainable_takes_names_of_parameters(tmp_path):
    assert moved(tmp_path, trainable=["head", "logit_scale"]) == {"head.weight", "head.bias", "logit_scale"}
    report = lp.inspect(Temperature(), lp.BitFit(trainable=["query"]))
    assert report.modules["query"] == "trains"
    with pytest.raises(lp.TargetError, match="'logit_scail' matches nothing; nearest: logit_scale"):
        lp.inspect(Temperature(), lp.LoRA(trainable=["logit_scail"]))


def test_frozen_parameters_in_an_optimizer_are_named(tmp_path):
    with pytest.warns(
        UserWarning, match=r"empty parameter group, because all its parameters are frozen: logit_scale, query\."
    ):
        moved(tmp_path)


def test_checkpoints_and_adapter_files_hold_them(tmp_path):
    module = Temperature()
    run = toys.trainer(tmp_path, method=toys.lora(trainable=["head", "logit_scale", "query"]), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = lp.load_from_checkpoint(Temperature, tmp_path / "a.ckpt")
    x = torch.randn(4, 16)
    torch.testing.assert_close(again.eval()(x), module.eval()(x), rtol=0, atol=0)
    lp.save_adapter(module, tmp_path / "adapter")
    loaded = Temperature().eval()
    lp.load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)


def test_a_class_token_of_vit_and_its_file_in_peft(tmp_path):
    import peft

    from tests.methods.tiny import vit

    model = vit()
    base = copy.deepcopy(model)
    lp.apply(model, lp.LoRA(r=2, targets=["q_proj"], trainable=["cls_token"]))
    with torch.no_grad():
        for p in lp.trainable_parameters(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    lp.save_adapter(model, tmp_path)
    images = torch.randn(2, 3, 16, 16)
    wanted = model(pixel_values=images)[0]
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(images)[0], wanted)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(images)[0], wanted)
