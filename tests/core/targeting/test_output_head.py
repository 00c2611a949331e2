"""Test how the output head is found, parts that the user froze, and stacks with one block."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.targeting.frozen_parts import frozen_parts
from lightning_peft.core.targeting.sites import output_head
from lightning_peft.core.targeting.trial_forward import try_forward
from tests.helpers import assert_same_bits, bits
from tests.methods.tiny import Block, bert, vit


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


class Net(nn.Module):
    """A head, defined before a network that the output does not depend on."""

    def __init__(self, auxiliary: str = "teacher", head: str = "head") -> None:
        super().__init__()
        self.net = body()
        self.name = head
        setattr(self, head, nn.Linear(8, 3))
        setattr(self, auxiliary, copy.deepcopy(self.net))

    def forward(self, x):
        return getattr(self, self.name)(self.net(x))


class Silent(Net):
    """The same model, whose forward depends on values, so that a trial is impossible."""

    def forward(self, x):
        return super().forward(x) if x.abs().max().item() else x


@pytest.mark.parametrize("head", ["head", "zap"])
def test_the_head_is_what_the_output_comes_from(head):
    model = Net(head=head)
    assert output_head(model) == head
    assert lp.inspect(model, lp.LinearProbe()).modules == {head: "trains in full"}
    assert head not in lp.inspect(model, lp.LoRA(targets="all-linear")).modules


def test_without_a_trial_forward_the_head_is_found_by_name_and_reported():
    model = Silent()
    assert try_forward(model) is None
    report = lp.inspect(model, lp.LoRA())
    assert any("head (the output head, by its name) stays frozen" in note for note in report.notes)


def test_a_trial_changes_nothing():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.norm, self.calls, self.seen = nn.BatchNorm1d(8), 0, []

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            return self.head(self.norm(self.net(x) + torch.rand(1, device=x.device)))

    model = Counts().train()
    before, stream = bits(model), torch.get_rng_state()
    assert output_head(model) == "head"
    assert_same_bits(bits(model), before)
    assert (model.calls, model.seen, model.training) == (0, [], True)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(m._forward_hooks for m in model.modules())


def test_several_heads_and_residual_streams():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.box, self.kind, self.net = nn.Linear(8, 4), nn.Linear(8, 3), body()

        def forward(self, x):
            y = self.net(x)
            return {"box": self.box(y), "kind": self.kind(y)}

    assert output_head(Two()) == "kind"
    assert output_head(bert()) == "classifier"


def test_the_head_in_a_lightning_module_with_an_example_input():
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.example_input_array = Net(), (torch.zeros(2, 8), 2.0)

        def forward(self, x, scale):
            return self.model(x * scale)

    assert output_head(Module()) == "model.head"


# --- parts that the user froze -----------------------------------------------------------------------------------


class Perceptual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.vgg = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).requires_grad_(False)

    def forward(self, x):
        return self.head(self.net(x))


AUTOMATIC = {
    "LoRA": lp.LoRA,
    "SSF": lp.SSF,
    "BitFit": lp.BitFit,
    "NormTuning": lp.NormTuning,
    "LastLayers": lambda: lp.LastLayers(1),
    "GradualUnfreezing": lp.GradualUnfreezing,
    "FullFineTuning": lp.FullFineTuning,
    "blocks": lambda: lp.BottleneckAdapter(targets="all-blocks", bottleneck_size=2),
}


@pytest.mark.parametrize("method", AUTOMATIC)
def test_a_part_that_the_user_froze_is_left_alone_and_named(method):
    model = Perceptual()
    report = lp.apply(model, AUTOMATIC[method]())
    assert "vgg was frozen before and is left alone (160 parameters)" in report.notes
    assert not any(name.startswith("vgg") for name in report.modules)
    assert not any(p.requires_grad for p in model.vgg.parameters())
    assert frozen_parts(model) == ["vgg"]  # parts that were frozen before are still known after methods are applied
    again = lp.apply(model, lp.LoRA(r=2, name="second"))
    assert not any(name.startswith("vgg") for name in again.modules)


def test_a_frozen_part_is_adapted_where_it_is_named():
    report = lp.apply(Perceptual(), lp.LoRA(r=2, targets=["vgg.*"]))
    assert list(report.modules) == ["vgg.0", "vgg.2"]
    assert not any("left alone" in note for note in report.notes)


def test_a_model_frozen_as_a_whole_or_but_for_its_head():
    assert lp.inspect(Perceptual().requires_grad_(False), lp.LoRA(r=2)).modules.keys() >= {"net.0", "vgg.0"}
    model = Perceptual()
    model.net.requires_grad_(False)
    with pytest.raises(lp.TargetError, match=r"Skipped because you froze them .*: net, vgg. Name them in targets"):
        lp.apply(model, lp.LoRA(r=2))


def test_tied_and_packed_weights_are_not_taken_for_frozen():
    model = nn.Module()
    model.embed, model.fc, model.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
    model.out.weight = model.embed.weight
    model.packed = nn.Module()
    model.packed.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert frozen_parts(model) == []
    lp.apply(model, lp.LoRA(r=2, targets=["fc"]))
    assert frozen_parts(model) == []


# --- one block ---------------------------------------------------------------------------------------------------


class OneBlock(nn.Module):
    def __init__(self, container=nn.ModuleList) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.patch = nn.Linear(12, 16)
        block = Block(16)
        self.blocks = nn.ModuleList([block]) if container is nn.ModuleList else container(block)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch(x)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Wrapped(L.LightningModule):
    def __init__(self, model) -> None:
        super().__init__()
        self.vit = model

    def forward(self, x):
        return self.vit(x)


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["plain", "wrapped"])
def test_a_stack_of_one_block(container, wrap):
    start = "vit." if wrap is Wrapped else ""

    def made(method):
        return set(lp.inspect(wrap(OneBlock(container)), method).modules)

    assert made(lp.LinearProbe()) == {f"{start}head"}
    assert made(lp.LastLayers(1)) == {f"{start}{name}" for name in ("blocks.0", "norm", "head")}
    assert made(lp.VisualPromptTuning(3)) == {f"{start}blocks.0"}


def test_a_selection_shows_its_share_and_a_probe_of_everything_is_an_error():
    model = OneBlock()
    share = 100 * sum(p.numel() for p in model.head.parameters()) / sum(p.numel() for p in model.parameters())
    assert f"LinearProbe trains {share:.3g} % of the base" in lp.inspect(model, lp.LinearProbe()).notes
    with pytest.raises(lp.TargetError, match="LinearProbe would train the whole Sequential: 1 holds all"):
        lp.apply(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), lp.LinearProbe(trainable="1"))


def test_advice_of_a_probe_can_be_followed():
    class Metric(nn.Module):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), Metric())
    with pytest.raises(lp.TargetError, match=r"for example trainable=\['2'\]"):
        lp.apply(model, lp.LinearProbe())
    assert lp.inspect(model, lp.LinearProbe(trainable=["2"])).trainable == 74
    with pytest.raises(lp.TargetError, match="matches only modules without parameters: 3"):
        lp.apply(model, lp.LinearProbe(trainable=["3"]))


def test_the_hint_of_all_linear_matches():
    class Own(nn.Module):  # a linear layer with a bare parameter, like PyTorch Geometric's
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    model = nn.Module()
    model.conv = Own()
    with pytest.raises(lp.TargetError, match=r"no linear layer; this model has \['Own'\]: .* targets='") as error:
        lp.apply(model, lp.LoRA(r=2))
    hint = str(error.value).rpartition("targets='")[2].rstrip("'")
    assert lp.inspect(model, lp.LoRA(r=2, targets=hint)).trainable == 16
    with pytest.raises(lp.TargetError, match=r"targets=\[\] is empty"):
        lp.apply(vit(), lp.LoRA(targets=[]))
    with pytest.raises(lp.TargetError, match=r"targets=\[\] is empty"):
        lp.apply(vit(), lp.FullFineTuning(targets=[]))


def test_the_report_says_what_all_linear_does_not_reach():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2))
    total = sum(p.numel() for p in model.parameters())
    conv, norm = (100 * sum(p.numel() for p in model[i].parameters()) / total for i in (0, 1))
    note = f"does not reach {conv + norm:.3g} % of the parameters: Conv2d {conv:.3g} %, BatchNorm2d {norm:.3g} %"
    assert any(note in each for each in lp.inspect(model, lp.LoRA(r=2)).notes)
    assert not any("does not reach" in note for note in lp.inspect(Net(), lp.LoRA(r=2, targets=["net.*"])).notes)
