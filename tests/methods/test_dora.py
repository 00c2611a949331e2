"""Compare DoRA with PEFT where PEFT is right, and with the matrix everywhere."""

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import close, perturb
from tests.methods.invariants import (
    KINDS,
    check_against_matrix,
    check_checkpointed_and_compiled,
    check_fit,
    check_invariants,
    check_parity,
    net,
)

R, COUNT = 2, 2 * (8 + 12 + 12 + 12 + 12 + 8) + 12 + 12 + 8


def dora(**options):
    return lp.DoRA(**{"r": R, "alpha": 4, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind):
    check_against_matrix(dora, kind)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_invariants(init):
    check_invariants(lambda **o: dora(init=init, **o), COUNT)


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(dora)


def test_fit():
    check_fit(dora, groups=True)


def test_attention_and_experts():
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)})
    nn.init.normal_(attention["a"].in_proj_bias)
    plain, x = copy.deepcopy(attention), torch.randn(2, 5, 8)
    lp.apply(attention, dora(targets=["a"]))
    assert torch.equal(attention["a"](x, x, x)[0], plain["a"](x, x, x)[0])
    perturb(attention)
    moved = attention["a"](x, x, x)[0]
    lp.merge(attention)
    close(attention["a"](x, x, x)[0], moved)


LORA = {f"lora_{n}": f"lora_{n}.default.weight" for n in "AB"} | {"magnitude": "lora_magnitude_vector.default.weight"}


@pytest.mark.parametrize("case", ["linear", "conv2d", "embedding", "Conv1D"])
def test_parity_with_peft(case):
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    names, options = LORA, {}
    if case == "linear":
        base, x, targets = net(), torch.randn(4, 5, 8), ["0", "2", "4"]
    elif case == "conv2d":
        base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False))
        x, targets = torch.randn(2, 3, 9, 9), ["0", "2"]
    elif case == "embedding":
        base, x = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randint(0, 9, (3, 5))
        targets = ["0"]
        names = {f"lora_{n}": f"lora_embedding_{n}.default" for n in "AB"} | {
            "magnitude": "lora_magnitude_vector.default.weight"
        }
    else:
        base, x, targets = nn.Sequential(Conv1D(6, 8), nn.Tanh(), Conv1D(4, 6)), torch.randn(4, 8), ["0", "2"]
        options = {"fan_in_fan_out": True}
    config = peft.LoraConfig(r=R, lora_alpha=4, target_modules=targets, use_dora=True, **options)
    check_parity(dora(targets=targets), config, base, x, names)


def test_the_norm_is_a_constant_for_the_gradient():
    layer = nn.ModuleDict({"l": nn.Linear(6, 4, bias=False).double()})
    lp.apply(layer, dora(targets=["l"], adapter_dtype="float64"))
    perturb(layer)
    adapter, x = layer["l"].adapters["default"], torch.randn(3, 6, dtype=torch.float64)
    direction = layer["l"].weight + 2 * adapter.lora_B @ adapter.lora_A
    norm = direction.norm(dim=1, keepdim=True).detach()
    expected = x @ (adapter.magnitude[:, None] / norm * direction).T
    output = layer["l"](x)
    close(output, expected, 1e-12)
    for parameter in (adapter.lora_A, adapter.lora_B, adapter.magnitude):
        mine, reference = (torch.autograd.grad(y.sum(), parameter, retain_graph=True)[0] for y in (output, expected))
        close(mine, reference, 1e-12)


def test_norms_are_kept_in_evaluation_and_never_stale(monkeypatch):
    model, x = net(), torch.randn(3, 8)
    lp.apply(model, dora(targets=["0"]))
    perturb(model)
    model.eval()
    adapter = model[0].adapters["default"].requires_grad_(False)
    counted = []
    norm = type(adapter)._norm
    monkeypatch.setattr(type(adapter), "_norm", lambda self, w: counted.append(1) or norm(self, w))
    with torch.inference_mode():
        first = model(x)
        model(x)
    assert len(counted) == 1
    adapter.requires_grad_(True)
    model.train()
    model(x).sum().backward()  # values computed in inference mode are not used here
    model.eval()
    perturb(model, seed=8)
    second = model(x)
    assert (first - second).abs().max() > 1e-3
    lp.merge(model)
    close(model(x), second)


@torch.no_grad()
def test_averages_written_through_data_are_evaluated_with_their_own_norms():
    model, x = net(), torch.randn(3, 8)
    lp.apply(model, dora(targets=["0"]))
    model.eval()
    model(x)
    for parameter in lp.trainable_parameters(model):
        parameter.data.copy_(parameter + 0.3)  # as EMAModel.copy_to and torch_ema do
    output = model(x)
    lp.merge(model)
    close(model(x), output)


def test_magnitudes_are_those_of_what_earlier_adapters_made():
    model, x = net(), torch.randn(3, 8)
    lp.apply(model, lp.LoRA(r=2))
    perturb(model)
    moved = model(x)
    lp.apply(model, dora(name="second"))
    close(model(x), moved, 1e-6)


def test_a_row_of_zeros_gives_no_nan():
    layer = nn.ModuleDict({"l": nn.Linear(6, 4)})
    with torch.no_grad():
        layer["l"].weight[1] = 0
    plain, x = copy.deepcopy(layer), torch.randn(3, 6)
    lp.apply(layer, dora(targets=["l"]))
    assert torch.equal(layer["l"](x), plain["l"](x))


def test_errors():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="DoRA reads the weights, but '0' is on the meta device"):
        lp.apply(model, dora(targets=["0"]))
    with pytest.raises(ValueError, match="add a second DoRA with dropout=0"):
        lp.apply(
            nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}),
            dora(targets=["a"], dropout=0.1),
        )
