"""LoHa compared with PEFT and the matrix; the Tucker form; both kinds of dropout."""

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

R, COUNT = 2, 2 * 2 * (8 + 12 + 12 + 12 + 12 + 8)


def loha(**options):
    return lp.LoHa(**{"r": R, "alpha": 4, **options})


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, effective):
    check_against_matrix(loha, kind, use_effective_conv2d=effective)


def test_invariants():
    check_invariants(loha, COUNT)


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(loha)


def test_fit():
    check_fit(lambda: loha(rank_dropout=0.3, module_dropout=0.3))


@pytest.mark.parametrize("case", ["linear", "patterns", "conv2d", "conv2d effective", "conv1d"])
def test_parity_with_peft(case):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, parts = {}, ["w1_a", "w1_b", "w2_a", "w2_b"]
    if case in ("linear", "patterns"):
        base, x, targets = net(), torch.randn(2, 5, 8), ["0", "2", "4"]
        if case == "patterns":
            ours = {"rank_pattern": {"2": 4}, "alpha_pattern": {"4": 9}}
    elif case == "conv1d":
        base = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.Tanh(), nn.Conv1d(6, 4, 1))
        x, targets = torch.randn(2, 4, 9), ["0", "2"]
    else:
        base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), nn.Tanh(), nn.Conv2d(6, 4, (3, 2)))
        x, targets = torch.randn(2, 4, 9, 9), ["0", "2"]
        if "effective" in case:
            ours, parts = {"use_effective_conv2d": True}, [*parts, "t1", "t2"]
    config = peft.LoHaConfig(r=R, alpha=4, target_modules=targets, **ours)
    names = {f"hada_{n}": f"hada_{n}.default" for n in parts}
    # PEFT's hand-written backward takes the other factor's core for w1_a and w2_a of the Tucker form.
    check_parity(loha(targets=targets, **ours), config, base, x, names, gradients_too="effective" not in case)


def test_effective_counts():
    model = nn.ModuleDict({"c": nn.Conv2d(4, 6, (3, 2), groups=2)})
    assert lp.apply(model, loha(targets="c", use_effective_conv2d=True)).trainable == 2 * R * (2 + 6 + R * 6)


@pytest.mark.parametrize("method", [lp.LoHa, lp.LoKr])
@pytest.mark.parametrize("scale", [False, True])
def test_rank_dropout_leaves_out_rows(method, scale):
    model, x = nn.ModuleDict({"l": nn.Linear(8, 1000)}), torch.randn(1, 8)
    plain = nn.Linear(8, 1000)
    plain.load_state_dict(model["l"].state_dict())
    lp.apply(model, method(r=2, targets=["l"], rank_dropout=0.25, rank_dropout_scale=scale))
    perturb(model)
    torch.manual_seed(0)
    change = model["l"](x) - plain(x)
    whole = model["l"].eval()(x) - plain(x)
    dropped = change.abs() < 1e-7
    assert 180 < dropped.sum() < 320
    by = 1000 / (1000 - dropped.sum()) if scale else 1
    close(change[~dropped], by * whole[~dropped], 1e-5)


@pytest.mark.parametrize("method", [lp.LoHa, lp.LoKr])
def test_module_dropout_leaves_out_all(method):
    model, x, base = net(), torch.randn(4, 8), net()
    lp.apply(model, method(r=2, targets=["0"], module_dropout=0.4))
    perturb(model)
    whole = model.eval()(x)
    model.train()
    torch.manual_seed(0)
    outputs = [model(x) for _ in range(200)]
    off = sum(torch.equal(y, base(x)) for y in outputs)
    assert 50 < off < 110
    assert all(torch.allclose(y, base(x)) or torch.allclose(y, whole, atol=1e-6) for y in outputs)
    lp.merge(model)  # in training mode, but without dropping any part of the update
    close(model(x), whole)


def test_dropping_all_rows_gives_no_nan():
    model = nn.ModuleDict({"l": nn.Linear(8, 2)})
    lp.apply(model, loha(targets=["l"], rank_dropout=0.9, rank_dropout_scale=True))
    assert all(model["l"](torch.randn(2, 8)).isfinite().all() for _ in range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_dropout": 1}, r"rank_dropout must be a probability in \[0, 1\), got 1"),
        ({"module_dropout": -0.1}, "module_dropout must be a probability"),
        ({"alpha": 0}, "alpha must be a finite number other than 0, got 0"),
        ({"rank_pattern": {"zero": 3}}, "rank_pattern: 'zero' matches nothing"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lp.apply(net(), loha(**options))
