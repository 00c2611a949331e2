"""Test parameter overrides on every kind of layer and with every operation, and which ones are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_peft as lp
from lightning_peft.core.injection.attach import attach
from lightning_peft.core.injection.overrides import ParameterOverride, override_trained, parameter_overrides
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.ties import under_all_names
from tests.helpers import assert_compiled_gradients, assert_same_bits, bits, close, evaluate, perturb, same
from tests.kinds import KINDS, MLP, Kind


class Norms(nn.Module):
    """Layers that do not occur in the kinds of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.norm = nn.RMSNorm(5)
        self.batch = nn.BatchNorm1d(4)
        self.weights = nn.Parameter(torch.randn(5))
        self.out = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.out(self.batch(self.norm(self.inner(x)[0])) * self.weights)


# Parameters that a weight is computed from cannot be overridden.
ALL = {
    **{n: k for n, k in KINDS.items() if n != "weight_norm"},
    "norms": Kind(Norms, lambda: (torch.randn(3, 4, 6),), {}),
}


class Copies(lp.PEFTMethod):
    """Replaces values of the base by a given state."""

    def __init__(self, state=None, trainable_copies: bool = False, **options):
        super().__init__(audit="off", **options)  # tensors are not arguments that could be saved
        self.state, self.trainable_copies = state, trainable_copies

    def plan(self, model: nn.Module) -> Plan:
        plan = Plan()
        override_trained(plan, model, self.state, self.trainable_copies)
        return plan


def _other(kind: Kind) -> nn.Module:
    """A model of the same kind with other weights and, if it has any, other norm statistics."""
    other = kind.build(seed=9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        other(*kind.batch(3))
    return other


@pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
def test_with_all_of_it_replaced_a_model_is_the_other_one(kind: Kind):
    model, other = kind.build(), _other(kind)
    base, expected, plain = evaluate(model, kind), evaluate(other, kind), bits(model)
    assert (base - expected).abs().max() > 1e-3
    lp.apply(model, Copies(state=other.state_dict(), name="other"))
    close(evaluate(model, kind), expected)
    assert not lp.trainable_parameters(model)
    with lp.disabled(model):
        same(kind, evaluate(model, kind), base)
    assert_same_bits(bits(model, plain), plain)
    before = bits(model)
    lp.merge(model)
    close(evaluate(model, kind), expected)
    assert_same_bits(bits(model, plain), {k: v for k, v in other.state_dict().items() if k in plain})
    lp.unmerge(model)
    assert_same_bits(bits(model), before)
    lp.unload(model)
    assert_same_bits(bits(model), plain)
    assert torch.equal(evaluate(model, kind), base)


def test_keys_are_those_of_an_adapter():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "norms": Norms()})
    lp.apply(model, Copies(state=model.state_dict(), name="b"))
    keys = set(lp.adapter_state(model, "b"))
    assert {"attn.adapters.b.in_proj_weight", "attn.adapters.b.out_proj.bias", "norms.adapters.b.weights_"} <= keys
    assert {"norms.inner.adapters.b.weight_hh_l1", "norms.batch.adapters.b.running_var"} <= keys
    assert len(keys) == 4 + len(Norms().state_dict())


def test_gradients_reach_the_copies_and_not_the_base():
    for kind in (KINDS["linear"], KINDS["mha"], ALL["norms"], KINDS["resnet"], KINDS["tied"]):
        model, other = kind.build(), _other(kind)
        state = {k: v.clone() for k, v in other.state_dict().items()}
        lp.apply(model, Copies(state=state, trainable_copies=True, train_norm_stats=True))
        model(*kind.batch()).pow(2).mean().backward()
        other.load_state_dict(state)
        other(*kind.batch()).pow(2).mean().backward()
        named = {k.replace("adapters.default.", "").replace("weights_", "weights"): p for k, p in _trains(model)}
        assert len(named) == len(dict(other.named_parameters()))
        for name, parameter in other.named_parameters():
            close(named[name].grad, parameter.grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        for name, buffer in other.named_buffers():  # the statistics changed, and only those of the copy
            owner, _, last = name.rpartition(".")
            assert torch.equal(model.get_submodule(owner).adapters["default"].get_buffer(last), buffer)
            assert torch.equal(model.get_buffer(name), kind.build().get_buffer(name))


def _trains(model: nn.Module):
    return [(k, p) for k, p in model.named_parameters() if p.requires_grad]


def test_a_head_of_another_width():
    kind = KINDS["linear"]
    model = kind.build()
    base, before = evaluate(model, kind), bits(model)
    head = nn.Linear(8, 5)
    lp.apply(model, lp.LoRA(r=2, targets=["up"], name="a"))
    lp.apply(model, Copies(state={"head.weight": head.weight, "head.bias": head.bias}, name="wide"))
    hidden = model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    seen: list[torch.Tensor] = []
    expected = evaluate(model, kind)
    close(expected, head(seen[0]))
    hidden.remove()
    weight = model.head.weight
    lp.merge(model, "wide")
    assert model.head.weight.shape == (5, 8)
    assert model.head.out_features == 5
    close(evaluate(model, kind), expected)
    lp.unmerge(model)
    assert model.head.weight is weight
    assert model.head.out_features == 3
    with lp.active(model, "a"):
        assert torch.equal(evaluate(model, kind), base)
    lp.unload(model)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("first", ["lora", "copies"])
def test_the_order_with_a_weight_adapter(first: str):
    kind = KINDS["linear"]
    model, other = kind.build(), _other(kind)
    methods = [lp.LoRA(r=2, name="lora"), Copies(state={"mid.weight": other.mid.weight}, name="copies")]
    for method in methods if first == "lora" else methods[::-1]:
        lp.apply(model, method)
    perturb(model, name="lora")
    part = model.mid.adapters["lora"]
    after = 0 if first == "lora" else part.scale * part.lora_B @ part.lora_A  # the copy hides adapters before it
    x = torch.randn(4, 12)
    close(model.mid(x), x @ (other.mid.weight + after).T)
    expected, before = evaluate(model, kind), bits(model)
    lp.merge(model)
    close(evaluate(model, kind), expected)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)
    with pytest.raises(lp.MergeError, match="merged alone it would run before it"):
        lp.merge(model, "copies" if first == "lora" else "lora")


def test_merging_a_bias_ahead_of_a_weight_adapter():
    kind = KINDS["linear"]
    model = kind.build()
    lp.apply(model, lp.LoRA(r=2, name="lora"), Copies(state={"up.bias": torch.ones(12)}, name="bias"))
    expected = evaluate(perturb(model, name="lora"), kind)
    lp.merge(model, "bias")
    assert torch.equal(model.up.bias, torch.ones(12))
    close(evaluate(model, kind), expected)


def test_copies_join_the_adapter_of_the_same_name():
    class Both(lp.LoRA):
        def plan(self, model):
            plan = super().plan(model)
            override_trained(plan, model, {"up.bias": torch.ones(12), "down.bias": torch.ones(8)})
            return plan

    kind = KINDS["linear"]
    model = kind.build()
    base = evaluate(model, kind)
    lp.apply(model, Both(r=2, bias="all", name="task", targets=["up"]))
    perturb(model)
    assert [n for n in bits(model) if ".adapters." in n] == [
        *(f"up.adapters.task.{n}" for n in ("lora_A", "lora_B", "replacement.bias")),
        "down.adapters.task.bias",
    ]
    part, x = model.up.adapters["task"], torch.randn(4, 6)
    close(model.up(x), x @ model.up.weight.T + part.replacement.bias + part.scale * x @ part.lora_A.T @ part.lora_B.T)
    expected, before = evaluate(model, kind), bits(model)
    lp.merge(model)
    close(evaluate(model, kind), expected)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)
    lp.set_active(model)
    assert torch.equal(evaluate(model, kind), base)


def test_tied_tensors_stay_tied():
    kind = KINDS["tied"]
    model = kind.build()
    new = torch.randn_like(model.embed.weight)
    both = under_all_names(model, {"lm_head.weight": new})
    adapters = parameter_overrides(model, both, trainable=True)
    assert adapters["embed"].weight is adapters["lm_head"].weight
    lp.apply(model, Copies(state=both))
    expected = evaluate(model, kind)
    lp.unload(model, merge=True)
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, new)
    assert torch.equal(evaluate(model, kind), expected)
    apart = parameter_overrides(model, {"lm_head.weight": new, "embed.weight": new + 1}, trainable=True)
    assert torch.equal(apart["embed"].weight, apart["lm_head"].weight + 1)
    assert list(parameter_overrides(model, {"lm_head.weight": new})) == ["lm_head"]


def test_a_lower_model_takes_copies_of_full_precision():
    kind = KINDS["linear"]
    other = _other(kind)
    model = kind.build().to(torch.bfloat16)
    lp.apply(model, Copies(state=other.state_dict()))
    assert model.up.adapters["default"].weight.dtype == torch.float32
    x = kind.batch()[0].bfloat16()
    assert torch.equal(model.eval()(x), other.bfloat16().eval()(x))


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "mha_batch_first", "resnet"])
def test_one_graph(name: str):
    kind = KINDS[name]
    model = kind.build()
    lp.apply(model, Copies(state=_other(kind).state_dict(), trainable_copies=True))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(2):
        assert_compiled_gradients(compiled, model, *kind.batch(seed))
    assert counter.frame_count == 1


def _model() -> nn.Module:
    return nn.ModuleDict(
        {
            "mlp": MLP(),
            "norm": nn.LayerNorm(4),
            "attn": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv1d(4, 4, 1, groups=2),
            "weighted": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        }
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"mlp.up.weigth": torch.zeros(12, 6)}, "mlp.up.weigth: the base has no such .*nearest: mlp.up.weight"),
        ({"mlp.up.weight": torch.zeros(12, 5)}, r"mlp.up.weight: \(12, 5\) given, \(12, 6\) in the base"),
        ({"mlp.up.weight": torch.zeros(5, 6)}, "mlp.up.weight: has 5 outputs, but mlp.up.bias has 12: replace both"),
        ({"mlp.up.weight": torch.zeros(0, 6)}, r"\(0, 6\) given"),
        ({"norm.weight": torch.zeros(5)}, r"norm.weight: \(5,\) given, \(4,\) in the base"),
        ({"attn.out_proj.weight": torch.zeros(5, 4)}, r"\(5, 4\) given, \(4, 4\) in the base"),
        ({"conv.weight": torch.zeros(8, 2, 1), "conv.bias": torch.zeros(8)}, "groups or padding index require"),
        ({"norm.weight": torch.full((4,), torch.nan)}, "norm.weight: holds NaN or infinity"),
        ({"norm.weight": torch.zeros(4, dtype=torch.int8)}, "torch.int8 given, torch.float32 in the base"),
        (
            {"weighted.parametrizations.weight.original0": torch.zeros(3, 1)},
            "remove the parametrization first",
        ),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_its_name(state: dict[str, torch.Tensor], message: str):
    with pytest.raises(StateError, match=message):
        parameter_overrides(_model(), state)


def test_an_adapter_of_the_base_is_no_part_of_it():
    model = MLP()
    lp.apply(model, lp.LoRA(r=2))
    with pytest.raises(StateError, match=r"up.adapters.default.lora_A: the base has no such parameter"):
        parameter_overrides(model, lp.adapter_state(model))


def test_two_replacements_of_one_name_are_refused():
    model = MLP()
    lp.apply(model, Copies(state={"up.bias": torch.zeros(12)}, name="a"))
    with pytest.raises(ValueError, match="'up' already carries an adapter named 'a'"):
        attach(model, "up", "a", ParameterOverride({"weight": torch.zeros(12, 6)}))
