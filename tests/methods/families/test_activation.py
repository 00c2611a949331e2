from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.methods.fitting import BATCHES, TOKENS, ConvNet, bert, encoder, gpt2, llama, run, seeded


class OutputShift(lp.ActivationMethod):
    """A user-defined method."""

    def build(self, site):
        return ShiftAdapter(site)


class ShiftAdapter(lp.ActivationAdapter):
    def __init__(self, site):
        super().__init__(site)
        self.shift = nn.Parameter(torch.linspace(0, 1, site.width))

    def forward(self, x, y):
        return y + self.shift.view(-1, *[1] * (y.ndim - 2)) if self.axis == 1 else y + self.shift


@pytest.mark.parametrize("make", [bert, llama, gpt2, encoder])
@pytest.mark.parametrize("targets", ["all-attention", "all-feedforward", "all-blocks", "all-linear"])
def test_a_toy_method_runs_everywhere(make, targets):
    model, x = make(), BATCHES[make]
    base = run(model, x)
    report = lp.apply(model, OutputShift(targets=targets))
    assert report.trainable >= 3 * 16
    assert (run(model, x) - base).abs().max() > 1e-3
    with lp.disabled(model):
        torch.testing.assert_close(run(model, x), base, rtol=1e-5, atol=2e-6)


class Pair(NamedTuple):
    hidden: Tensor
    rest: str


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "named", "dict"])
def test_outputs_keep_their_type_and_what_else_they_hold(kind):
    class Layer(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            make = {"tensor": y, "tuple": (y, "rest"), "list": [y, "rest"], "named": Pair(y, "rest")}
            return {**make, "dict": {"hidden": y, "rest": "rest"}}[kind]

    def hidden(output):
        return output if kind == "tensor" else output["hidden"] if kind == "dict" else output[0]

    model = nn.ModuleDict({"layer": Layer(4, 4)})
    x = torch.randn(2, 4)
    before = model["layer"](x)
    lp.apply(model, OutputShift(targets="layer"))
    after = model["layer"](x)
    assert type(after) is type(before)
    torch.testing.assert_close(hidden(after), hidden(before) + torch.linspace(0, 1, 4))
    if kind != "tensor":
        assert (after["rest"] if kind == "dict" else after[1]) == "rest"


def test_model_outputs_keep_their_type():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, x):
            return self.inner(x)

    model = Wrapper()
    before = model(TOKENS)
    lp.apply(model, OutputShift(targets="inner", width=16))
    after = model(TOKENS)
    assert type(after) is type(before)
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state + torch.linspace(0, 1, 16))
    torch.testing.assert_close(after[0], after.last_hidden_state)


def test_feature_maps_are_known_by_their_layers():
    model = seeded(ConvNet)
    model.head = nn.Identity()  # the output is the mean of the feature maps
    x = torch.randn(2, 3, 9, 9)
    base = model(x)
    lp.apply(model, OutputShift(targets="layer2"))
    torch.testing.assert_close(model(x), base + torch.linspace(0, 1, 8))


def test_exclude_and_trainable():
    model = encoder()
    report = lp.apply(model, OutputShift(targets=["all-attention", "all-feedforward"], exclude=["layers.0", "linear2"]))
    assert set(report.modules) == {"layers.1.self_attn", "layers.2.self_attn"}
    model = encoder()
    report = lp.apply(model, OutputShift(targets="all-feedforward", trainable="layers.1"))
    assert {"layers.0.linear2", "layers.2.linear2"} < set(report.modules)
    assert "layers.1.linear2" not in report.modules


def test_bad_input():
    with pytest.raises(lp.TargetError, match=r"'layers' is a ModuleList, which is never called: .*'layers\.\*'"):
        lp.apply(encoder(), OutputShift(targets="layers"))
    with pytest.raises(lp.TargetError, match=r"out_proj' is never called: .* Name 'layers.0.self_attn'"):
        lp.apply(encoder(), OutputShift(targets="out_proj"))
    with pytest.raises(lp.TargetError, match=r"output width of '1' \(ReLU\) .*pass width="):
        lp.apply(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), OutputShift(targets="1"))
    with pytest.raises(lp.TargetError, match="'sef_attn' matches nothing; nearest: self_attn"):
        lp.apply(encoder(), OutputShift(targets="sef_attn"))
    with pytest.raises(lp.TargetError, match="exclude: 'nothing' matches nothing"):
        lp.apply(encoder(), OutputShift(exclude="nothing"))
    with pytest.raises(lp.TargetError, match="excludes everything"):
        lp.apply(encoder(), OutputShift(exclude="layers.*"))
    with pytest.raises(ValueError, match="width must be an integer"):
        OutputShift(width=0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    lp.apply(model, OutputShift(targets="1", width=5))
    with pytest.raises(ValueError, match=r"'1' returned an output of shape \(2, 4\).*expected to hold 5 features"):
        model(torch.randn(2, 4))
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4)})
    lp.apply(model, OutputShift(targets="lstm", width=4))
    assert model["lstm"](torch.randn(3, 2, 4))[0].shape == (3, 2, 4)
