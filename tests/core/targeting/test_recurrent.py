"""Compare adapted recurrent layers with plain ones that have W + s B A in place of each weight, in float64."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lightning_peft as lp
from lightning_peft.core.targeting.sites import output_head, weight_sites
from tests.helpers import assert_same_bits, bits, close, differ, perturb

LAYERS = {
    "lstm": lambda: nn.LSTM(4, 5, batch_first=True),
    "lstm proj": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=2),
    "lstm dropout": lambda: nn.LSTM(4, 5, num_layers=2, dropout=0.5),
    "gru": lambda: nn.GRU(4, 5, num_layers=2, bidirectional=True, bias=False),
    "rnn": lambda: nn.RNN(4, 5, nonlinearity="relu", batch_first=True),
}


def adapted(layer: nn.Module, *names: str) -> nn.ModuleDict:
    """Return a float64 model that holds ``layer``, with a LoRA on every weight."""
    model = nn.ModuleDict({"layer": layer}).double()
    for name in names or ("default",):
        lp.apply(model, lp.LoRA(r=2, alpha=4, targets=["layer"], name=name, adapter_dtype="float64"))
    return perturb(model, scale=0.5)


def reference(layer: nn.Module, x: Tensor | PackedSequence, name: str = "default") -> tuple:
    """The output of a plain copy of ``layer`` with s B A added to each weight."""
    plain = lp.unload(nn.ModuleDict({"layer": copy.deepcopy(layer)}))["layer"]
    adapters = layer.adapters[name].weights()
    assert len(adapters) == sum(n.startswith("weight") for n, _ in plain.named_parameters())
    weights = {n: plain.get_parameter(n).detach() + 2 * (a.lora_B @ a.lora_A) for n, a in adapters.items()}
    torch.manual_seed(3)
    return functional_call(plain, weights, (x,))


def tensors(output: tuple) -> list[Tensor]:
    y, state = output
    return [y.data if isinstance(y, PackedSequence) else y, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_layers_are_the_dense_update(kind: str, packed: bool):
    model = adapted(LAYERS[kind]())
    layer, x = model["layer"], torch.randn(3, 3, 4, dtype=torch.float64)
    given = pack_padded_sequence(x, torch.tensor([2, 3, 1]), layer.batch_first, enforce_sorted=False) if packed else x
    torch.manual_seed(3)  # the dropout between layers
    ours, theirs = tensors(layer(given)), tensors(reference(layer, given))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layer.adapters["default"].weights())
    gradients = [torch.autograd.grad(sum(t.pow(2).sum() for t in out), trained) for out in (ours, theirs)]
    for mine, other in zip([*ours, *gradients[0]], [*theirs, *gradients[1]]):
        close(mine, other, 1e-11)
    before = bits(model)
    lp.merge(model)
    torch.manual_seed(3)
    for mine, other in zip(tensors(layer(given)), theirs):
        close(mine, other, 1e-11)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("kind", ["lstm", "lstm proj", "gru"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@torch.no_grad()
def test_rows_of_packed_sequences_with_initial_states(kind: str, order: list[int]):
    model = adapted(LAYERS[kind](), "a", "b").eval()
    layer, names = model["layer"], ["a", "b", None, "a"]
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    x = x if layer.batch_first else x.transpose(0, 1)
    lengths = torch.tensor([3, 3, 2, 1])[order]
    deep = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or 5, 5) if isinstance(layer, nn.LSTM) else (5,)
    states = tuple(torch.randn(deep, 4, size, dtype=torch.float64) for size in sizes)

    def run(rows: list[int], packed: bool) -> list[Tensor]:
        part = x[rows] if layer.batch_first else x[:, rows]
        hx = tuple(s[:, rows] for s in states)
        if packed:
            is_sorted = order == sorted(order)
            part = pack_padded_sequence(part, lengths[rows], layer.batch_first, enforce_sorted=is_sorted)
        y, *state = tensors(layer(part, hx if len(hx) > 1 else hx[0]))
        if packed:
            y = layer(part, hx if len(hx) > 1 else hx[0])[0]
            assert y.batch_sizes.equal(part.batch_sizes)
            y = pad_packed_sequence(y, layer.batch_first, total_length=3)[0]
        return [y if layer.batch_first else y.transpose(0, 1), *(s.transpose(0, 1) for s in state)]

    for packed in (False, True):
        want = []
        for i, name in enumerate(names):
            with lp.active(model, *([name] if name else [])):
                want.append(run([i], packed))
        with lp.rows(model, names):
            got = run([0, 1, 2, 3], packed)
        for mine, parts in zip(got, zip(*want)):
            close(mine, torch.cat(parts), 1e-11)
    with lp.rows(model, names), pytest.raises(lp.RowError, match="without a batch"):
        layer(torch.randn(4, 4, dtype=torch.float64))


@torch.no_grad()
def test_threads_with_other_adapters_share_a_layer():
    model = adapted(nn.LSTM(4, 5), "a", "b")
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def run(name: str | None) -> Tensor:
        with lp.active(model, name) if name else lp.disabled(model):
            return model["layer"](x)[0]

    want = {name: run(name) for name in ("a", "b", None)}
    names = ["a", None, "b"] * 40
    with ThreadPoolExecutor(3) as pool:
        for name, got in zip(names, pool.map(run, names)):
            assert torch.equal(got, want[name])


def test_all_linear_and_patterns_find_them_and_the_head_is_a_layer_that_is_called():
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4), "cell": nn.LSTMCell(4, 3), "last": nn.RNN(3, 3)})
    assert {n for n, s in weight_sites(model).items() if s.linear_like} == {
        *("rnn.weight_ih_l0", "rnn.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"),
        *("last.weight_ih_l0", "last.weight_hh_l0"),
    }
    assert output_head(model) is None
    counts = {"rnn": 2, "type:LSTMCell": 2, "type:RNNBase": 4, "weight_hh_l0": 2, "*.weight_ih*": 3}
    for pattern, count in counts.items():
        assert lp.inspect(model, lp.LoRA(r=2, targets=[pattern])).trainable > 0
        assert len(lp.LoRA(targets=[pattern]).find(model, [])[0]) == count, pattern


def test_a_merge_can_untie_a_weight_shared_by_two_layers():
    model = nn.ModuleDict({"a": nn.RNN(3, 3), "b": nn.RNN(3, 3)})
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    lp.apply(model, lp.LoRA(r=2, targets=["a"]))
    perturb(model)
    x = torch.randn(2, 1, 3)
    adapted_output, shared = model["a"](x)[0], model["b"](x)[0]
    with pytest.raises(lp.MergeError, match="same tensor"):
        lp.merge(model)
    lp.merge(model, untie=True)
    close(model["a"](x)[0], adapted_output)
    assert torch.equal(model["b"](x)[0], shared)
    lp.unmerge(model)
    assert model["a"]._flat_weights[1] is model["a"].weight_hh_l0 is model["b"].weight_hh_l0
    close(model["a"](x)[0], adapted_output)


def test_cells_are_those_of_peft():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.ModuleDict({"cell": nn.GRUCell(4, 5)}))
    theirs = copy.deepcopy(model)
    names = ["cell.weight_ih", "cell.weight_hh"]
    lp.apply(model, lp.LoRA(r=2, alpha=4, targets=names))
    perturb(model, scale=0.5)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=names)
    wrapped = peft.get_peft_model(theirs, config)
    adapters = model[0]["cell"].adapters["default"].weights()
    layer = wrapped.base_model.model[0]["cell"]
    while hasattr(layer, "lora_A"):
        adapter = adapters[layer.parameter_name]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
        layer = layer.base_layer
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    differ(model[0]["cell"](x, h), layer(x, h))
    close(model[0]["cell"](x, h), wrapped.base_model.model[0]["cell"](x, h))
