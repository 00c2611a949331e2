"""Weights that a parent module reads instead of calling their layer: the parent gets the adapted values.

The kind ``reads`` of tests/table.py tests this for every weight method.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.core.adapters.reads import unreadable_tensor
from tests.helpers import assert_compiled_gradients, close, differ, perturb
from tests.kinds import KINDS

X = torch.arange(12).view(2, 6)


class TiedLM(nn.Module):
    """A head that is the embedding's weight, and a norm whose parameters are read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok, self.mid, self.norm = nn.Embedding(12, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        h = F.layer_norm(self.mid(self.tok(ids)), (8,), self.norm.weight, self.norm.bias)
        return F.linear(h, self.tok.weight)


class TypeOfRead(nn.Module):
    """Reads only the dtype of a weight, as T5's feed-forward does, and calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        if isinstance(self.down.weight, Tensor) and x.dtype != self.down.weight.dtype:
            x = x.to(self.down.weight.dtype)
        return self.down(x)


class ListOfScales(nn.Module):
    """Parameters in containers, which have no forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 6)
        self.scales = nn.ParameterList([torch.ones(6), torch.zeros(6)])
        self.maps = nn.ParameterDict({"a": torch.eye(6)})

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scales
        return (self.lin(x) * scale + shift) @ self.maps["a"]


def mamba() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


def output(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        out = model.eval()(x)
    return getattr(out, "logits", out)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (TiedLM, lp.LoRA(r=2, targets=["tok", "mid"])),
        (TiedLM, lp.DoRA(r=2, targets=["tok", "mid"])),
        (TiedLM, lp.LoRA(r=2, targets=["mid"], trainable_tokens={"tok": [4, 5]})),
        (mamba, lp.LoRA(r=2)),
        (mamba, lp.OFT(block_size=4, exclude=["dt_proj"])),
    ],
    ids=["tied lora", "tied dora", "tied tokens", "mamba lora", "mamba oft"],
)
def test_adapted_is_merged(make, method):
    model = make()
    lp.apply(model, method)
    perturb(model).double()
    with lp.disabled(model):
        base = output(model)
    adapted = output(model)
    differ(adapted, base)
    lp.merge(model)
    close(output(model), adapted, 1e-6)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (TiedLM, lp.LoRA(r=2, targets=["mid"], trainable=["tok"])),
        (TiedLM, lp.NormTuning()),
        (TiedLM, lp.LoRA(r=2, targets=["mid"], bias="all")),
        (mamba, lp.LoRA(r=2, targets=["in_proj"], bias="all")),
    ],
    ids=["head", "norm", "biases", "mamba's biases"],
)
def test_loaded_copies_compute_what_was_trained(make, method, tmp_path):
    model = make()
    lp.apply(model, method)
    with torch.no_grad():
        for parameter in lp.trainable_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    lp.save_adapter(model, tmp_path)
    loaded = make()
    base = output(loaded)
    lp.load_adapter(loaded, tmp_path)
    close(output(loaded), output(model))
    with lp.disabled(loaded):
        assert torch.equal(output(loaded), base)


def test_copies_in_containers_of_parameters(tmp_path):
    x, model = torch.randn(3, 6), ListOfScales()
    lp.apply(model, lp.LoRA(r=2, targets=["lin"], trainable=["scales", "maps"]))
    perturb(model)
    with torch.no_grad():
        for parameter in (*model.scales, *model.maps.values()):
            parameter.add_(torch.randn_like(parameter))
    lp.save_adapter(model, tmp_path)
    loaded = ListOfScales()
    lp.load_adapter(loaded, tmp_path)
    close(output(loaded, x), output(model, x))


def test_outside_of_a_forward_it_is_the_stored_parameter():
    model, x = KINDS["reads"].build(), KINDS["reads"].batch()[0]
    stored = dict(model.named_parameters())
    lp.apply(model, lp.LoRA(r=2, targets=["up", "down"]))
    perturb(model)
    assert model.up.weight is stored["up.weight"]
    assert model.get_parameter("down.weight") is stored["down.weight"]
    found = []
    model.head.register_forward_hook(lambda *_: found.extend([model.get_parameter("up.weight"), model.up.weight]))
    model(x)
    assert found[0] is stored["up.weight"]
    close(found[1], stored["up.weight"] + model.up.adapters["default"].delta(stored["up.weight"]))
    copied = copy.deepcopy(model)
    assert isinstance(copied.up.weight, nn.Parameter)
    close(copied(x), model(x))


def test_the_type_of_a_weight_can_be_read_where_its_value_cannot():
    model, x = TypeOfRead(), torch.randn(4, 6)
    lp.apply(model, lp.LoRA(r=2, dropout=0.5))
    perturb(model).train()
    assert model(x).requires_grad  # dropout acts in the call
    with lp.rows(model, ["default", None] * 2):
        rows = output(model, x)
    close(rows[::2], output(model, x)[::2])
    with lp.disabled(model):
        close(rows[1::2], output(model, x)[1::2])


def test_dropout_on_a_weight_that_is_read_is_refused_in_training():
    model, x = KINDS["reads"].build(), KINDS["reads"].batch()[0]
    lp.apply(model, lp.LoRA(r=2, dropout=0.5, targets=["up", "down"]))
    model.eval()(x)
    with pytest.raises(ValueError, match=r"dropout=0.5 is not supported on 'up': another module reads .*dropout=0"):
        model.train()(x)


def test_gate_on_a_weight_that_is_read_is_refused():
    model, x = KINDS["reads"].build(), KINDS["reads"].batch()[0]
    lp.apply(model, lp.GatedLoRA(r=2, targets=["up"]))
    with pytest.raises(ValueError, match="GatedLoRA is not supported on 'up': another module reads"):
        model(x)


def test_rows_of_a_weight_that_is_read():
    model, x = KINDS["reads"].build().eval(), KINDS["reads"].batch()[0]
    for i, name in enumerate("ab"):
        lp.apply(model, lp.LoRA(r=2, targets=["up", "down"], name=name))
        perturb(model, seed=i, name=name)
    with lp.active(model, "b"):
        expected = model(x)
    with lp.rows(model, ["b"] * 3):
        close(model(x), expected)
    with (
        lp.rows(model, ["a", "b", None]),
        pytest.raises(ValueError, match=r"different adapters for the rows .* 'weight'"),
    ):
        model(x)


def test_read_in_a_checkpointed_region():
    model, x = KINDS["reads"].build(), KINDS["reads"].batch()[0]
    lp.apply(model, lp.LoRA(r=2, targets=["up"]))
    perturb(model)
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):

        def region(x: Tensor) -> Tensor:
            return F.linear(x, model.up.weight).sin()

        class Around(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return region(x) if options is None else checkpoint(region, x, **options)  # noqa: B023

        model.zero_grad()
        Around()(x.clone().requires_grad_()).sum().backward()
        gradients.append([p.grad.clone() for p in lp.trainable_parameters(model)])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            close(a, b)


@pytest.mark.parametrize("method", [lp.LoRA(r=2, targets=["up", "down"]), lp.DoRA(r=2, targets=["up", "down", "conv"])])
def test_one_graph(method):
    model, kind = KINDS["reads"].build(), KINDS["reads"]
    lp.apply(model, method)
    perturb(model)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(2):
        assert_compiled_gradients(compiled, model, *kind.batch(seed))
    assert counter.frame_count == 1


def test_compiled_a_value_that_cannot_be_given_is_an_error_only_if_used():
    torch.compiler.reset()
    model, x = TypeOfRead(), torch.randn(4, 6)
    lp.apply(model, lp.LoRA(r=2, dropout=0.5))
    assert torch.compile(model.train(), backend="aot_eager", fullgraph=True)(x).requires_grad
    read = KINDS["reads"].build()
    lp.apply(read, lp.LoRA(r=2, dropout=0.5, targets=["up"]))
    with pytest.raises(ValueError, match=r"dropout=0.5 is not supported on 'up'"):
        torch.compile(read.train(), backend="aot_eager", fullgraph=True)(KINDS["reads"].batch()[0])


def test_a_refused_value_has_its_shape_and_nothing_else():
    like = torch.zeros(2, 3, dtype=torch.float64)
    value = unreadable_tensor(like, "not here")
    assert (value.shape, value.dtype, value.device, value.ndim) == (like.shape, like.dtype, like.device, 2)
    for use in (lambda t: t + 1, lambda t: F.linear(torch.ones(1, 3), t), lambda t: t.t(), lambda t: t.sum().item()):
        with pytest.raises(ValueError, match="not here"):
            use(value)


@pytest.mark.parametrize("method", [lp.LoHa(r=2, targets=["up", "down", "head"]), lp.LoRA(r=2, targets=["up", "head"])])
def test_threads(method):
    model, x = KINDS["reads"].build().eval(), KINDS["reads"].batch()[0]
    lp.apply(model, method)
    perturb(model)
    expected, wrong = output(model, x), []

    def serve() -> None:
        for _ in range(50):
            try:
                wrong.extend([] if torch.allclose(output(model, x), expected, atol=1e-5) else ["differs"])
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
