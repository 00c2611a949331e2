"""LoKr compared with PEFT and the matrix, in all decompositions."""

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.lokr import factorize
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

# 12 x 8 is (3 x 2) (x) (4 x 4), 12 x 12 is (3 x 3) (x) (4 x 4), 8 x 12 is (2 x 3) (x) (4 x 4)
FULL, LOW = 6 + 9 + 6 + 3 * 16, 6 + 9 + 6 + 3 * 8


def lokr(**options):
    return lp.LoKr(**{"r": 1, "alpha": 2, **options})


@pytest.mark.parametrize(
    "options", [{}, {"r": 4}, {"decompose_both": True, "decompose_factor": 4}, {"use_effective_conv2d": True}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, options):
    check_against_matrix(lokr, kind, **options)


@pytest.mark.parametrize(("r", "count"), [(1, LOW), (2, FULL)])
def test_invariants(r, count):
    check_invariants(lambda **o: lokr(r=r, **o), count)


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(lokr)


def test_fit():
    check_fit(lambda: lokr(rank_dropout=0.3, module_dropout=0.3))


CASES = {
    "linear": {},
    "full": {"r": 4},
    "factor": {"decompose_factor": 4},
    "both": {"decompose_both": True, "decompose_factor": 4},
    "conv2d": {},
    "conv2d full": {"r": 4},
    "conv2d effective": {"use_effective_conv2d": True},
    "conv1d": {"decompose_factor": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_peft(case):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if case.startswith("conv2d"):
        base = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=2), nn.Tanh(), nn.Conv2d(12, 8, (3, 2)))
        x, targets = torch.randn(2, 8, 9, 9), ["0", "2"]
    elif case == "conv1d":
        base = nn.Sequential(nn.Conv1d(8, 12, 3, padding=1, groups=2), nn.Tanh(), nn.Conv1d(12, 8, 1))
        x, targets = torch.randn(2, 8, 9), ["0", "2"]
    else:
        base, x, targets = net(), torch.randn(2, 5, 8), ["0", "2", "4"]
    config = peft.LoKrConfig(**{"r": 1, "alpha": 2, "target_modules": targets, **CASES[case]})
    names = {f"lokr_{n}": f"lokr_{n}.default" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    check_parity(lokr(targets=targets, **CASES[case]), config, base, x, names)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 8, 100])
def test_factors_are_those_of_peft(factor):
    lokr_layer = pytest.importorskip("peft.tuners.lokr.layer")
    for n in range(1, 200):
        assert factorize(n, factor) == lokr_layer.factorization(n, factor), n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decompose_factor": 0}, "decompose_factor must be -1 or an integer of at least 1, got 0"),
        ({"r": 0}, "r must be an integer of at least 1"),
        ({"module_dropout": 2}, "module_dropout must be a probability"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lokr(**options)


def test_the_update_is_a_kronecker_product():
    """Compare with torch.kron, on the channels and the kernel of a convolution."""
    layer = nn.Conv2d(6, 8, (2, 3), groups=1)
    model, plain = nn.ModuleDict({"c": layer}), copy.deepcopy(layer)
    lp.apply(model, lokr(r=8, alpha=4, targets=["c"]))
    perturb(model)
    adapter = layer.adapters["default"]
    first, second = adapter.lokr_w1.detach(), adapter.lokr_w2.detach()
    assert first.shape == (2, 2)
    with torch.no_grad():
        plain.weight.add_(torch.kron(first[..., None, None], second.view(4, 3, 2, 3)), alpha=0.5)
    x = torch.randn(2, 6, 5, 6)
    close(layer(x), plain(x))
