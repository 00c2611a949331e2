"""Adapters on layers with packed weights give the same results as on the equivalent float layers."""

from __future__ import annotations

import copy
from abc import ABC

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp
from lightning_peft.core.targeting.attention_sites import attention_sites
from lightning_peft.core.targeting.packed import dequantized
from tests.helpers import close, perturb


class GPTQLinear(nn.Module):
    """4-bit codes, eight to an int32, with scales and zero points by group of inputs, as GPTQ and AWQ store them."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, group: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = inputs, outputs, group
        generator = torch.Generator().manual_seed(inputs * outputs)
        codes = torch.randint(0, 16, (inputs // 8, 8, outputs), generator=generator)
        zeros = torch.randint(6, 10, (inputs // group, outputs // 8, 8), generator=generator)
        shifts = 4 * torch.arange(8)
        self.register_buffer("shifts", shifts.int())
        self.register_buffer("qweight", (codes << shifts[:, None]).sum(1).int())
        self.register_buffer("qzeros", (zeros << shifts).sum(-1).int())
        self.register_buffer("scales", torch.rand(inputs // group, outputs, generator=generator) / 10 + 0.01)
        self.register_buffer("bias", torch.randn(outputs, generator=generator) if bias else None)

    def weight_of(self) -> torch.Tensor:
        codes = ((self.qweight[:, None] >> self.shifts[:, None]) & 15).flatten(0, 1)
        zeros = ((self.qzeros[..., None] >> self.shifts) & 15).flatten(1)
        return (self.scales.repeat_interleave(self.group, 0) * (codes - zeros.repeat_interleave(self.group, 0))).t()

    def forward(self, x):
        return F.linear(x, self.weight_of(), self.bias)


class Odd(GPTQLinear):
    """A layer with the same state that computes a different function."""

    def forward(self, x):
        return super().forward(x).relu()


class Encoded(nn.Parameter):
    """A tensor subclass, like those of quantisation libraries."""


def packed(layer: type[nn.Module] = GPTQLinear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layer(16, 24), nn.Tanh(), layer(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 3))


def dequantised(model: nn.Sequential) -> nn.Sequential:
    """The same model with float layers."""
    found = []
    for layer in model:
        if isinstance(layer, GPTQLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = layer.weight_of()
            if layer.bias is not None:
                plain.bias.data = layer.bias
            layer = plain
        found.append(layer)
    return nn.Sequential(*found)


METHODS = {
    "LoRA": lambda: lp.LoRA(r=2, lora_bias=True),
    "PiSSA": lambda: lp.LoRA(r=2, init="pissa"),
    "DoRA": lambda: lp.DoRA(r=2),
    "LoHa": lambda: lp.LoHa(r=2),
    "OFT": lambda: lp.OFT(block_size=4),
    "IA3": lambda: lp.IA3(targets=["0"], feedforward_targets=["2"]),
    "SSF": lambda: lp.SSF(targets=["0"]),
    "Bottleneck": lambda: lp.BottleneckAdapter(targets=["2"]),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_outputs_and_gradients_are_those_on_the_dequantised_base(make):
    x = torch.randn(2, 5, 16)
    found = []
    for model in (packed(), dequantised(packed())):
        report = lp.apply(model, make())
        perturb(model)
        y = model(x)
        y.square().sum().backward()
        found.append((y, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, report.total))
    (y, gradients, total), (expected, others, other_total) = found
    close(y, expected)
    assert gradients.keys() == others.keys() != set()
    for name, gradient in gradients.items():
        close(gradient, others[name], 1e-4)
    # The biases of the packed layer are buffers.
    assert total == other_total - 24


def test_the_matrix_is_found_from_what_the_layer_computes():
    layer = packed()[0]
    close(dequantized(layer), layer.weight_of(), 1e-6)
    report = lp.inspect(packed(), lp.LoRA(r=2))
    size = sum(b.nbytes for layer in packed()[0::2] for n, b in layer.named_buffers() if n != "bias")
    assert f"2 layers have quantised weights (GPTQLinear): 768 parameters in {size:,} bytes" in report.notes


def test_a_registered_function_is_checked_and_used():
    class Right(GPTQLinear):
        pass

    class Wrong(GPTQLinear):
        pass

    calls = []
    lp.register_quantized(Right, lambda layer: calls.append(layer) or layer.weight_of())
    lp.register_quantized(Wrong, lambda layer: layer.weight_of() + 0.1)
    model = packed(Right)
    lp.apply(model, lp.LoHa(r=2))
    model(torch.randn(2, 16))
    assert {*calls} == {model[0], model[2]}
    with pytest.raises(lp.TargetError, match=r"'0' .* its registered dequantize returns is not the one"):
        lp.apply(packed(Wrong), lp.LoRA(r=2))
    with pytest.raises(TypeError, match=r"takes a subclass of nn.Module and a function"):
        lp.register_quantized(F.linear, len)


def test_a_packed_layer_that_is_not_linear_is_refused():
    with pytest.raises(
        lp.TargetError, match=r"'0' .*\(Odd\) cannot be adapted as it is: it does not compute a linear map"
    ):
        lp.apply(packed(Odd), lp.LoRA(r=2))


def test_a_tensor_subclass_is_used_through_its_layer():
    model, plain = (dequantised(packed()) for _ in range(2))
    model[0].weight = Encoded(model[0].weight.detach())
    for each in (model, plain):
        lp.apply(each, lp.LoRA(r=2))
        perturb(each)
    x = torch.randn(4, 16)
    assert torch.equal(model(x), plain(x))


def test_merge_is_refused_and_unload_gives_the_packed_layer_back():
    model = packed()
    x = torch.randn(4, 16)
    expected, kinds = model(x), [type(m) for m in model.modules()]
    lp.apply(model, lp.LoRA(r=2))
    perturb(model)
    with pytest.raises(ValueError, match=r"'0' \(GPTQLinear\) has a quantised weight"):
        lp.merge(model)
    lp.unload(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), expected)


def test_an_adapter_moves_between_packed_models_but_not_to_a_float_one(tmp_path):
    model = packed()
    lp.apply(model, lp.LoRA(r=2))
    perturb(model)
    lp.save_adapter(model, tmp_path)
    other = packed()
    lp.load_adapter(other, tmp_path)
    x = torch.randn(4, 16)
    assert torch.equal(other(x), model(x))
    with pytest.raises(lp.StateError, match=r"no quantised layers, .* a base with 2 quantised GPTQLinear"):
        lp.load_adapter(dequantised(packed()), tmp_path)
    plain = dequantised(packed())
    lp.load_adapter(plain, tmp_path, check_base=False)
    close(plain(x), model(x))


@pytest.mark.parametrize(
    "make", [lambda: lp.LoRA(r=2, lora_bias=True), lambda: lp.DoRA(r=2), lambda: lp.OFT(block_size=4)]
)
def test_merge_dequantizes_if_asked_and_unmerge_packs_again(make):
    model, x = packed(), torch.randn(4, 16)
    lp.apply(model, make())
    perturb(model)
    expected, layer = model(x), model[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {k: id(v) for k, v in vars(layer).items()}
    with pytest.raises(lp.MergeError, match=r"lp.merge\(model, dequantize=True\) replaces the layer by a float one"):
        lp.merge(model)
    lp.merge(model, dequantize=True)
    assert type(layer) is not GPTQLinear
    assert isinstance(layer, nn.Linear)
    close(model(x), expected)
    lp.unmerge(model)
    assert isinstance(layer, GPTQLinear)
    assert {k: id(v) for k, v in vars(layer).items()} == attributes | {
        k: id(vars(layer)[k]) for k in ("_parameters", "_buffers")
    }
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[k], v) for k, v in before.items())
    assert torch.equal(model(x), expected)
    lp.unload(model, merge=True, dequantize=True)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert not hasattr(layer, "qweight")
    close(model(x), expected)


class QModuleMixin(ABC):  # noqa: B024
    """The first base of quanto's layers, which gives them another memory layout than nn.Linear has."""


class QLinear(QModuleMixin, GPTQLinear):
    pass


def test_a_layer_of_another_memory_layout_becomes_plain_and_packed_again():
    model, x = packed(QLinear), torch.randn(4, 16)
    lp.apply(model, lp.LoRA(r=2))
    perturb(model)
    expected = model(x)
    lp.merge(model, dequantize=True)
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], QLinear)
    close(model(x), expected)
    lp.unmerge(model)
    assert isinstance(model[0], QLinear)
    assert torch.equal(model(x), expected)
    lp.unload(model, merge=True, dequantize=True)
    copied = copy.deepcopy(model)
    assert [type(copied[i]) for i in (0, 2)] == [nn.Linear, nn.Linear]
    close(copied(x), expected)


def test_a_layer_that_cannot_become_plain_is_refused_and_left(monkeypatch):
    model, x = packed(), torch.randn(4, 16)
    lp.apply(model, lp.LoRA(r=2))
    perturb(model)
    expected = model(x)
    monkeypatch.setattr("lightning_peft.core.injection.plain_layer._plain_class", lambda packed: int)
    with pytest.raises(lp.MergeError, match=r"'0' cannot become a plain layer: .*layout"):
        lp.merge(model, dequantize=True)
    assert torch.equal(model(x), expected)


def test_the_rows_of_a_batch_use_different_adapters():
    x, found = torch.randn(3, 16), []
    for model in (packed(), dequantised(packed())):
        lp.apply(model, lp.LoRA(r=2, name="a", targets=["0", "2"]), lp.DoRA(r=2, name="b", targets=["0", "2"]))
        perturb(model)
        with lp.rows(model, ["a", "b", None]):
            found.append(model(x))
    close(*found)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (GPTQLinear(16, n) for n in (16, 8, 8))


def test_attention_with_packed_projections_is_found():
    site = attention_sites(nn.Sequential(Attention()))["0"]
    assert (site.key_width, site.value_width, site.query_width) == (8, 8, 16)


@pytest.mark.parametrize("method", [lp.FullFineTuning(), lp.LastLayers(targets=["0"])])
def test_a_packed_layer_cannot_train_in_full(method: lp.PEFTMethod):
    with pytest.raises(lp.TargetError, match=r"0.* cannot train because the weight is quantised"):
        lp.apply(packed(), method)
