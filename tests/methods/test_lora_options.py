"""LoRA's initialisations, LoRA+, LoRA-FA, and the conversion of PiSSA and OLoRA to plain LoRA."""

import copy
import math

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import close, perturb
from tests.methods.invariants import (
    KINDS,
    Task,
    check_against_matrix,
    check_checkpointed_and_compiled,
    check_fit,
    check_invariants,
    loader,
    net,
    trainer,
)

COUNT = 2 * (8 + 12 + 12 + 12 + 12 + 8)


def lora(**options):
    return lp.LoRA(**{"r": 2, "alpha": 3, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_layers(init, kind):
    check_against_matrix(lora, kind, init=init)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_invariants(init):
    check_invariants(lambda **o: lora(init=init, **o), COUNT, exact=init != "orthogonal")


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(lambda: lora(init="pissa"))


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"freeze_A": True}], ids=str)
def test_fit(options):
    check_fit(lambda: lora(**options))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_and_trains_as_in_peft(init, use_rslora):
    """Initial factors equal PEFT's up to sign; from equal factors, outputs and gradients are equal too."""
    peft = pytest.importorskip("peft")
    model, theirs = net(), net()
    # PEFT subtracts the part from the base, and computes in float32
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init, use_rslora=use_rslora
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, config).base_model.model
    lp.apply(model, lora(r=4, alpha=6, targets=["0", "2"], init=init, use_rslora=use_rslora))
    pairs = []
    for i in (0, 2):
        adapter = model[i].adapters["default"]
        a, b = theirs[i].lora_A["default"].weight, theirs[i].lora_B["default"].weight
        close((adapter.lora_B @ adapter.lora_A).detach(), (b @ a).detach(), 1e-5)
        with torch.no_grad():  # one sign for each direction is free
            sign = (adapter.lora_A * a).sum(1).sign()
            a.mul_(sign[:, None])
            b.mul_(sign)
        close(adapter.lora_A.detach(), a.detach(), 1e-4)
        pairs += [(adapter.lora_A, a), (adapter.lora_B, b)]
    x = torch.randn(5, 8)
    perturb(model, scale=0.1)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    outputs = [model(x), theirs(x)]
    close(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), [p[i] for p in pairs]) for i, y in enumerate(outputs)]
    for mine, other in zip(*gradients):
        close(mine, other, 1e-4)


def test_the_fast_pissa_finds_the_principal_part():
    model, fast = net(), net()
    for m in (model, fast):
        with torch.no_grad():
            m[0].weight.add_(3 * torch.outer(torch.arange(12.0), torch.ones(8)))  # one direction stands out
        lp.apply(m, lora(r=1, targets=["0"], init="pissa" if m is model else "pissa_niter_8"))
    products = [(m[0].adapters["default"].lora_B @ m[0].adapters["default"].lora_A).detach() for m in (model, fast)]
    close(*products, 1e-4)


def test_orthogonal_halves():
    model = net()
    lp.apply(model, lora(r=4, init="orthogonal"))
    adapter = model[0].adapters["default"]
    assert adapter.lora_A.abs().max() > 0.01
    assert adapter.lora_B.abs().max() > 0.01
    assert (adapter.lora_B @ adapter.lora_A).abs().max() < 1e-7


def test_small_steps_survive_bfloat16():
    """A step below the bfloat16 resolution of PiSSA's large initial values still has an effect."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"l": nn.Linear(16, 16)}).bfloat16()
    plain, x = copy.deepcopy(model), torch.randn(64, 16).bfloat16()
    lp.apply(model, lora(r=4, init="pissa", targets=["l"]))
    adapter = model["l"].adapters["default"]
    assert torch.equal(model["l"](x), plain["l"](x))
    perturb(model, scale=1e-4)
    exact = (adapter.delta(plain["l"].weight).double() @ x.double().T).T
    h = adapter.layout.down(model["l"], x, adapter.factors()[0])
    update = adapter.layout.up(model["l"], h, adapter.factors()[1], torch.zeros_like(x), adapter.scale).double()
    assert (update - exact).norm() < 0.02 * exact.norm()


def test_freeze_a():
    model = net()
    report = lp.apply(model, lora(freeze_A=True))
    assert report.trainable == 2 * (12 + 12 + 8)
    model(torch.randn(4, 8)).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith("lora_A"))
    assert set(lp.adapter_state(model)) == {f"{i}.adapters.default.lora_{n}" for i in (0, 2, 4) for n in "AB"}
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lp.apply(tokens, lora(freeze_A=True, targets="0"))
    adapter = tokens[0].adapters["default"]
    assert adapter.lora_A.requires_grad
    assert not adapter.lora_B.requires_grad


def rates(model, method, groups):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups(trained), lr=0.01)
    method.configure_param_groups(optimizer, model)
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)
    return {n: of[id(p)] for n, p in trained.items()}


def test_lora_plus_splits_the_users_groups():
    model = nn.ModuleDict({"e": nn.Embedding(5, 8), "body": net()})
    method = lora(lora_plus_ratio=16, targets=["e", "0", "2"], trainable=["6"])
    lp.apply(model, method)

    def groups(trained):
        first = [p for n, p in trained.items() if ".0." in n]
        rest = [p for n, p in trained.items() if ".0." not in n]
        return [{"params": first, "weight_decay": 0.5}, {"params": rest, "lr": 0.001, "betas": (0.5, 0.9)}]

    of = rates(model, method, groups)
    for name, group in of.items():
        faster = 16 if name.endswith("lora_B") and not name.startswith("e.") else 1
        if ".0." in name:
            assert math.isclose(group["lr"], 0.01 * faster)
            assert group["weight_decay"] == 0.5
        else:
            assert math.isclose(group["lr"], 0.001 * faster)
            assert group["betas"] == (0.5, 0.9)


def test_lora_plus_of_two_adapters():
    model = net()
    first, second = lora(lora_plus_ratio=4), lora(name="second")
    lp.apply(model, first, second)
    of = rates(model, first, lambda trained: list(trained.values()))
    assert {n for n, g in of.items() if g["lr"] > 0.011} == {f"{i}.adapters.default.lora_B" for i in (0, 2, 4)}


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("schedule", ["lambda", "onecycle"])
def test_lora_plus_in_a_trainer(schedule, groups):
    """A schedule that was built before the split continues at both rates, also in a resumed run, bit for bit."""
    whole, resumed = check_fit(lambda: lora(lora_plus_ratio=8), groups=groups, schedule=schedule)
    plain = Task(groups=groups, schedule=schedule)
    trainer(lora(), 8, "c").fit(plain, loader())
    assert len(plain.rates) == len(whole.rates) == 8
    for mine, one in zip(whole.rates, plain.rates):
        assert mine[:2] == pytest.approx([one[0], 8 * one[0]])
        assert mine[2:] == pytest.approx(one[1:])
    assert resumed.rates == whole.rates[3:]


def test_lora_plus_is_the_two_rates_of_the_paper():
    """One SGD step changes B by ``lora_plus_ratio`` times as much as the optimizer's rate would."""
    model, method = net(), lora(lora_plus_ratio=16)
    lp.apply(model, method)
    perturb(model)
    before = lp.adapter_state(model)
    before = {k: v.clone() for k, v in before.items()}
    optimizer = torch.optim.SGD(lp.trainable_parameters(model), lr=1e-3)
    method.configure_param_groups(optimizer, model)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(before[name] - p.detach(), p.grad * (16e-3 if name.endswith("B") else 1e-3), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pizza"}, r"init must be one of 'kaiming', .* or 'pissa_niter_<iterations>' .*, got 'pizza'"),
        ({"init": "pissa_niter_"}, "init must be one of"),
        ({"init": "orthogonal", "r": 3}, "r must be even, but it is 3 at '0': use 4"),
        (
            {"init": "pissa", "r": 9},
            r"needs r=9 .* vectors of '0' \(12x8\), which has only 8: .* rank_pattern=\{'0': "
            r"8\}",
        ),
        ({"init": "olora", "alpha": -1}, "set alpha above 0"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio must be a number above 0, got 0"),
        ({"lora_plus_ratio": 4, "freeze_A": True}, "remove one"),
        ({"rank_pattern": {"nope": 2}}, "rank_pattern: 'nope' matches nothing"),
        ({"alpha_pattern": {"0": 0}}, r"alpha_pattern\['0'\] must be a finite number other than 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lp.apply(net(), lora(**options))


def test_a_base_without_values():
    with torch.device("meta"):
        model = net()
    with pytest.raises(ValueError, match="init='pissa' reads the weights, but '0' is on the meta device"):
        lp.apply(model, lora(init="pissa"))


class TestLoraBias:
    def test_it_trains_and_merges(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(1, 4, 3), nn.Linear(3, 3, bias=False))
        x = torch.randn(2, 1, 6)
        lp.apply(model, lp.LoRA(r=2, alpha=3, targets=["0", "1", "2"], lora_bias=True))
        with torch.no_grad():
            for p in lp.trainable_parameters(model):
                p.add_(torch.randn_like(p))
        want = model(x)
        assert not torch.allclose(want, model[2](model[1](model[0](x * 0))), atol=1e-3)
        want.sum().backward()
        assert all(model[i].adapters["default"].lora_bias.grad is not None for i in range(3))
        lp.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        lp.unload(model)
        assert model[2].bias is None

    @pytest.mark.parametrize("method", [lp.LoRA, lp.DoRA])
    def test_what_has_no_bias_is_an_error(self, method):
        model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3))
        targets = ["0"] if method is lp.LoRA else ["1"]
        with pytest.raises(ValueError, match="lora_bias=True"):
            lp.apply(model, method(r=2, targets=targets, lora_bias=True))
