"""Combining adapters and turning them into LoRA, against dense references and PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.injection.apply import install
from lightning_peft.core.injection.attach import attach
from lightning_peft.core.injection.overrides import override_trained
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.state_dict import load_state
from lightning_peft.core.targeting.sites import weight_sites
from lightning_peft.methods.combine import mix
from tests.core.adapters.test_stack import Add
from tests.helpers import adapter_parameters, assert_same_bits, bits, close, differ, evaluate, perturb
from tests.kinds import KINDS, Kind
from tests.methods.test_lora_options import lora, net
from tests.table import METHODS

WEIGHT_METHODS = {
    **{name: METHODS[name].make for name in ("lora_rs", "lora_patterns", "lora_pissa", "dora", "vera")},
    **{name: METHODS[name].make for name in ("loha", "lokr", "oft", "rescale")},
    "adalora": lambda kind, **o: lp.AdaLoRA(init_r=3, target_r=2, targets=kind.targets, **o),
    "dylora": lambda kind, **o: lp.DyLoRA(r=3, targets=kind.targets, **o),
}
KINDS_HERE = ["linear", "conv2d", "embedding", "mha", "experts", "gpt2", "tied"]


def matrices(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    """The model's matrices in float64 with one adapter merged."""
    if name is not None:
        lp.merge(model, name, untie=True)
    found = {n: s.layout.matrix(s.weight).detach().double().clone() for n, s in weight_sites(model).items()}
    if name is not None:
        lp.unmerge(model)
    return found


def expected(model: nn.Module, shares: dict[str, float]) -> dict[str, torch.Tensor]:
    base = matrices(model)
    result = {n: w.clone() for n, w in base.items()}
    for name, share in shares.items():
        with lp.active(model, name):
            changed = matrices(model, name)
        for n in result:
            result[n] += share * (changed[n] - base[n])
    return result


def check(model: nn.Module, kind: Kind, name: str, wanted: dict[str, torch.Tensor]) -> None:
    lp.set_active(model, name)
    found = matrices(model, name)
    for site, matrix in wanted.items():
        torch.testing.assert_close(found[site], matrix, rtol=1e-4, atol=2e-6)
    output = evaluate(model, kind)
    lp.merge(model, untie=True)
    close(evaluate(model, kind), output, 2e-5)
    lp.unmerge(model)


@pytest.mark.parametrize("kind", [KINDS[k] for k in KINDS_HERE], ids=KINDS_HERE)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_a_weighted_sum_of_two_methods(method: str, kind: Kind):
    model = kind.build()
    lp.apply(model, lp.LoRA(r=2, targets=kind.targets, name="lora"))
    lp.set_active(model)  # so that the weights of the base are read
    lp.apply(model, WEIGHT_METHODS[method](kind, name="other"))
    perturb(model, name="other")
    perturb(model, seed=3, name="lora")
    lp.set_active(model, "lora", "other")
    both, before, trains = evaluate(model, kind), bits(model), lp.trainable_parameters(model)
    report = lp.combine(model, ["lora", "other"], weights=[0.7, -0.3], name="mix")
    assert torch.equal(evaluate(model, kind), both)  # the new adapter is inactive
    assert_same_bits(bits(model, before), before)
    assert [id(p) for p in lp.trainable_parameters(model)] == [id(p) for p in trains]
    assert report.error < 1e-5
    assert set(report.ranks) == set(kind.matrices)
    if method == "lora_rs" and kind is KINDS["linear"]:
        assert set(report.ranks.values()) == {5}  # the factors are concatenated: 2 + 3
    check(model, kind, "mix", expected(model, {"lora": 0.7, "other": -0.3}))
    with lp.active(model, "lora", "other"):
        assert torch.equal(evaluate(model, kind), both)


@pytest.mark.parametrize("kind", [KINDS[k] for k in KINDS_HERE], ids=KINDS_HERE)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_to_lora(method: str, kind: Kind):
    model = kind.build()
    lp.apply(model, WEIGHT_METHODS[method](kind, name="task"))
    perturb(model)
    wanted, output = expected(model, {"task": 1}), evaluate(model, kind)
    report = lp.to_lora(model, "task", new_name="beside")
    assert not any(p.requires_grad for p in adapter_parameters(model, "beside").values())
    check(model, kind, "beside", wanted)
    lp.set_active(model, "task")
    assert lp.to_lora(model, "task").ranks == report.ranks
    assert report.error < 1e-5
    assert type(injection_state(model).methods["task"]) is lp.LoRA
    assert all(p.requires_grad for p in adapter_parameters(model, "task").values())
    close(evaluate(model, kind), output, 2e-5)
    check(model, kind, "task", wanted)
    fresh = kind.build()
    lp.apply(fresh, injection_state(model).methods["task"])
    load_state(fresh, lp.adapter_state(model, "task"))
    close(evaluate(fresh, kind), output, 2e-5)


def test_ranks_of_what_has_one():
    kind = KINDS["linear"]
    for method, rank in {"lora_rs": 3, "lora_pissa": 4, "loha": 4, "vera": 4, "adalora": 3, "dylora": 3}.items():
        model = kind.build()
        lp.apply(model, WEIGHT_METHODS[method](kind))
        perturb(model)
        assert set(lp.to_lora(model, "default").ranks.values()) == {rank}, method


@pytest.mark.parametrize("cut", [{"r": 2}, {"energy": 0.9}, {"energy": 1.0}, {"r": 1}])
@pytest.mark.parametrize("method", ["lokr", "oft", "lora"])
def test_the_reported_error_is_that_of_the_truncation(method: str, cut: dict[str, Any]):
    kind = KINDS["linear"]
    model = kind.build()
    make = METHODS[method].make
    lp.apply(model, make(kind, r=6) if method == "lora" else make(kind))
    base, whole = matrices(model), expected(perturb(model), {"default": 1})
    report = lp.to_lora(model, "default", **cut)
    kept = matrices(model, "default")
    missing = total = 0.0
    for site in kind.matrices:
        change, left = whole[site] - base[site], whole[site] - kept[site]
        s = torch.linalg.svdvals(change)
        rank = report.ranks[site]
        assert report.errors[site] == pytest.approx(float(left.norm() / change.norm()), abs=2e-5)
        # the best approximation of this rank
        assert report.errors[site] == pytest.approx(float(s[rank:].norm() / s.norm()), abs=2e-5)
        if "energy" in cut:
            assert report.errors[site] ** 2 <= 1 - cut["energy"] + 1e-6
            assert rank == 1 or float(s[rank - 1 :].norm() / s.norm()) ** 2 >= 1 - cut["energy"] - 1e-6
        else:
            assert rank == cut["r"]
        missing, total = missing + float(left.norm()) ** 2, total + float(change.norm()) ** 2
    assert report.error == pytest.approx((missing / total) ** 0.5, abs=2e-5)
    assert f"{report.error:.3g}" in str(report)


PEFT = {"linear": "svd", "cat": "cat", "svd": "svd", "ties": "ties_svd", "magnitude_prune": "magnitude_prune_svd"}


@pytest.mark.parametrize("how", PEFT)
def test_combined_equals_peft(how: str):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 14))
    config = {"target_modules": ["0", "2"], "lora_alpha": 8, "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, **config), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=4, **config))
    weights = [0.8, -0.4]
    pruned = {} if how in ("linear", "cat", "svd") else {"density": 0.3}
    rank = {"svd": 3}.get(how, 8 if how in ("linear", "cat") else 10)
    options = {} if how == "cat" else {"svd_rank": rank}
    theirs.add_weighted_adapter(["a", "b"], weights, "mix", combination_type=PEFT[how], **pruned, **options)

    ours = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 14))
    lp.apply(ours, *(lp.LoRA(r=4, alpha=8, targets="type:Linear", name=name) for name in "ab"))
    layers = {i: theirs.base_model.model[int(i)] for i in "02"}
    with torch.no_grad():
        for i, layer in layers.items():
            for name in "ab":
                ours[int(i)].adapters[name].lora_A.copy_(layer.lora_A[name].weight)
                ours[int(i)].adapters[name].lora_B.copy_(layer.lora_B[name].weight)
    report = lp.combine(ours, ["a", "b"], weights, "mix", how=how, **pruned, **({"r": rank} if how == "svd" else {}))
    for i, layer in layers.items():
        part = ours[int(i)].adapters["mix"]
        close(part.delta(layer.weight), layer.get_delta_weight("mix"))
        assert how not in ("cat", "svd") or report.ranks[i] == rank


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_keeps_the_mean(how: str):
    tasks, weights = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0)), [1.0, -0.5]
    if how == "dare_ties":
        tasks[1] = tasks[0].abs() * tasks[0].sign() * 0.5  # one sign everywhere
    results = [mix(tasks, weights, how, 0.4, torch.Generator().manual_seed(seed)) for seed in range(3000)]
    again = mix(tasks, weights, how, 0.4, torch.Generator().manual_seed(5))
    assert torch.equal(again, results[5])
    assert not torch.equal(results[4], results[5])
    first, second = tasks[0] / 0.4, -0.5 * tasks[1] / 0.4
    both = first + second if how == "dare_linear" else (first + second) / 2
    possible = torch.stack([torch.zeros_like(first), first, second, both])
    assert (possible - results[5]).abs().amin(0).max() < 1e-5
    if how == "dare_linear":
        mean = torch.stack(results).mean(0)
        assert (mean - (tasks[0] - 0.5 * tasks[1])).abs().mean() < 0.03


def test_combining_is_the_same_for_the_same_seed():
    kind = KINDS["linear"]
    states = []
    for seed in (0, 0, 1):
        model = kind.build()
        lp.apply(model, lp.LoRA(r=2, name="a"), lp.LoRA(r=2, name="b"))
        perturb(model)
        lp.combine(model, ["a", "b"], name="mix", how="dare_ties", density=0.5, seed=seed, r=2)
        states.append(lp.adapter_state(model, "mix"))
    assert_same_bits(states[0], states[1])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_a_weight_that_one_of_them_leaves_alone():
    kind = KINDS["linear"]
    model = kind.build()
    lp.apply(model, lp.LoRA(r=2, name="a", targets=["up", "mid"]), lp.LoRA(r=3, name="b", targets=["mid", "down"]))
    perturb(model)
    report = lp.combine(model, ["a", "b"], name="mix")  # equal shares
    assert report.ranks == {"up": 2, "mid": 5, "down": 3}
    check(model, kind, "mix", expected(model, {"a": 0.5, "b": 0.5}))


def test_adapters_of_low_precision_are_combined_in_a_higher_one():
    kind = KINDS["linear"]
    model = kind.build().bfloat16()
    lp.apply(model, *(lp.LoRA(r=2, name=name, adapter_dtype="bfloat16") for name in "ab"))
    perturb(model)
    lp.combine(model, ["a", "b"], weights=[0.3, 0.7], name="mix", r=3)
    parts = {name: model.up.adapters[name] for name in ("a", "b", "mix")}
    a, b = (parts[name].lora_B.double() @ parts[name].lora_A.double() * parts[name].scale for name in "ab")
    u, s, v = torch.linalg.svd(0.3 * a + 0.7 * b, full_matrices=False)
    found = parts["mix"].delta(model.up.weight.float()).double()
    torch.testing.assert_close(found, u[:, :3] @ torch.diag(s[:3]) @ v[:3], rtol=1e-4, atol=1e-6)


def _own(model: nn.Module, name: str, state: dict[str, torch.Tensor], **options: Any) -> None:
    method = lp.LoRA(r=2, name=name, **options)
    plan = method.plan(model)
    override_trained(plan, model, state)
    install(model, {name: (method, plan)})


def test_heads_and_biases_are_interpolated_by_sums():
    kind = KINDS["linear"]
    model = kind.build()
    first = {"head.weight": torch.ones(3, 8), "up.bias": torch.ones(12)}
    _own(model, "a", first, targets=["up"])
    _own(model, "b", {"head.weight": torch.zeros(3, 8)}, targets=["mid"])
    base = {k: v.detach().clone() for k, v in model.state_dict().items() if k in first}
    lp.combine(model, ["a", "b"], weights=[0.75, 0.25], name="mix")
    close(model.head.adapters["mix"].weight, 0.75 * first["head.weight"])
    close(model.up.adapters["mix"].replacement.bias, base["up.bias"] + 0.75 * (1 - base["up.bias"]))
    assert not model.mid.adapters["mix"].overrides()
    with pytest.raises(ValueError, match=r"head.weight.*, which how='ties' cannot combine"):
        lp.combine(model, ["a", "b"], name="mix2", how="ties", density=0.5)
    _own(model, "wide", {"head.weight": torch.ones(5, 8), "head.bias": torch.ones(5)}, targets=["up"])
    with pytest.raises(ValueError, match=r"head.weight of 'wide' has shape \(5, 8\) and the base's has shape \(3, 8\)"):
        lp.combine(model, ["a", "wide"], name="mix2")
    lp.to_lora(model, "wide")
    assert model.head.adapters["wide"].weight.shape == (5, 8)


def test_conversion_keeps_place_and_head():
    kind = KINDS["linear"]
    model = kind.build()
    lp.apply(model, lp.LoHa(r=2, name="first", trainable=["head"]), METHODS["rescale"].make(kind, name="second"))
    perturb(model)
    lp.set_active(model, "second")
    only = evaluate(model, kind)
    with lp.active(model, "first", "second"):
        both = evaluate(model, kind)
    lp.to_lora(model, "first")
    assert list(model.up.adapters) == ["first", "second"]
    close(evaluate(model, kind), only)
    assert model.head.weight.requires_grad
    assert injection_state(model).trained_base["first"].modules == ("head",)
    with lp.active(model, "first", "second"):
        close(evaluate(model, kind), both)


def _with(*methods: lp.PEFTMethod, kind: str = "linear") -> nn.Module:
    model = KINDS[kind].build()
    lp.apply(model, *methods)
    return model


def _merged() -> nn.Module:
    model = _with(lp.LoRA(r=2, name="a"))
    lp.merge(model)
    return model


def _activation() -> nn.Module:
    model = _with(lp.LoRA(r=2, name="a"))
    attach(model, "up", "add", Add(1.0))
    return model


TWO = (lp.LoRA(r=2, name="a"), lp.LoKr(r=2, name="b"))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: _with(*TWO), {"names": ["a", "c"]}, r"no adapter named 'c'; the model has \['a', 'b'\]"),
        (lambda: _with(*TWO), {"names": []}, "names must be a list of different adapters"),
        (lambda: _with(*TWO), {"names": "ab"}, "names must be a list of different adapters"),
        (lambda: _with(*TWO), {"names": ["a", "a"]}, "names must be a list of different adapters"),
        (lambda: _with(*TWO), {"name": "b"}, "already has an adapter named 'b'"),
        (lambda: _with(*TWO), {"name": "b.c"}, "cannot name an adapter"),
        (lambda: _with(*TWO), {"weights": [1.0]}, r"a finite number for each of \['a', 'b'\]"),
        (lambda: _with(*TWO), {"weights": [1.0, float("nan")]}, "a finite number for each"),
        (lambda: _with(*TWO), {"how": "sum"}, "how must be one of 'linear', 'cat', 'svd', 'ties'"),
        (lambda: _with(*TWO), {"how": "cat"}, "how='cat' needs low-rank adapters, but one at 'up' is not"),
        (lambda: _with(*TWO), {"how": "ties"}, "how='ties' needs density"),
        (lambda: _with(*TWO), {"density": 0.5}, "how='linear' does not use density"),
        (lambda: _with(*TWO), {"how": "ties", "density": 0}, r"density must be a fraction in \(0, 1\], got 0"),
        (lambda: _with(*TWO), {"r": 0}, "r must be an integer of at least 1"),
        (lambda: _with(*TWO), {"r": 2, "energy": 0.5}, "both set the rank"),
        (lambda: _with(*TWO), {"energy": 1.5}, r"energy must be a fraction in \(0, 1\], got 1.5"),
        (_merged, {"names": ["a"]}, r"merged into the base: call lp.unmerge\(model\) first"),
        (_activation, {"names": ["a", "add"]}, r"'add' at 'up' \(Add\) does not change weights"),
        (
            lambda: _with(lp.LoRA(r=2, name="a", targets=["up"]), lp.SSF(name="b", targets=["down"])),
            {},
            r"'b' at 'down' .* changes more than a matrix",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_before_anything_changes(make, arguments: dict[str, Any], message: str):
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        lp.combine(model, **{"names": ["a", "b"], "name": "mix", **arguments})
    assert_same_bits(bits(model), before)


def test_conversion_errors():
    model = _activation()
    before = bits(model)
    with pytest.raises(ValueError, match=r"no adapter named 'b'; the model has \['a', 'add'\]"):
        lp.to_lora(model, "b")
    with pytest.raises(ValueError, match=r"'add' at 'up' \(Add\) does not change weights"):
        lp.to_lora(model, "add")
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_lora_that_started_as_a_part_of_the_weight_becomes_plain(init: str, use_rslora: bool):
    options = {"rank_pattern": {"2": 1}, "alpha_pattern": {"4": 5.0}, "exclude": "6", "targets": "type:Linear"}
    model, base, x = net(), net(), torch.randn(5, 8)
    lp.apply(model, lora(init=init, use_rslora=use_rslora, **options))
    perturb(model)
    output = model(x)
    report = lp.to_lora(model, "default")
    method = injection_state(model).methods["default"]
    assert method.init == "kaiming"
    assert set(report.ranks.values()) == ({1, 2} if init == "kaiming" else {2, 4})
    lp.apply(base, method)
    load_state(base, lp.adapter_state(model, "default"))
    assert not any(name.endswith("0") and "lora" in name for name in base.state_dict())
    close(base(x), output)
    differ(net()(x), output)
