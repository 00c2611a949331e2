"""MiSS compared with PEFT and the matrix; files in both directions; errors."""

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.formats.models import llama, logits, made_by_peft, read_by_peft, tokens
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

VARIANTS = {"standard": {"r": 3}, "mini": {"r": 3, "mini_r": 2}, "bat": {"r": 4}}
#: what trains in net(), whose layers have 12, 12 and 8 outputs
COUNTS = {"standard": 3 * (12 + 12 + 8), "mini": 3 * 2 * 3, "bat": 4 * (12 + 12 + 8)}


def miss(variant="standard", **options):
    return lp.MiSS(variant=variant, **{**VARIANTS[variant], **options})


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind):
    check_against_matrix(miss, kind)


@pytest.mark.parametrize("variant", VARIANTS)
def test_invariants(variant):
    check_invariants(lambda **options: miss(variant, **options), COUNTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_and_compile(variant):
    check_checkpointed_and_compiled(lambda: miss(variant))


def test_fit():
    check_fit(lambda: miss(dropout=0.3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_peft(variant):
    """r=3 divides 12 columns, but not 8."""
    peft = pytest.importorskip("peft")
    config = peft.MissConfig(
        target_modules=["0", "2", "4"], init_weights=True if variant == "standard" else variant, **VARIANTS[variant]
    )
    x, names = torch.randn(2, 5, 8), {"miss_block": "miss_block.default"}
    check_parity(miss(variant, targets=["0", "2", "4"]), config, net(), x, names)


@pytest.mark.parametrize("init", [True, False, "mini", "bat"])
def test_files_of_peft_load_here_and_go_back(init, tmp_path):
    peft = pytest.importorskip("peft")
    base, x = llama(), tokens()
    config = peft.MissConfig(
        r=4, mini_r=2, miss_dropout=0.1, init_weights=init, target_modules=["q_proj", "k_proj", "down_proj"]
    )
    theirs = logits(made_by_peft(base, config, tmp_path / "theirs"), x)
    assert not torch.allclose(theirs, logits(base, x), atol=1e-3)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    close(logits(here, x), theirs, 1e-4)
    lp.save_adapter(here, tmp_path / "again")
    close(logits(read_by_peft(base, tmp_path / "again"), x), theirs, 1e-4)


def test_a_shard_gets_the_same_update():
    model = nn.ModuleDict({"l": nn.Linear(7, 2)})
    before = model["l"].weight.detach().clone()
    lp.apply(model, miss(targets=["l"]))
    perturb(model)
    lp.merge(model)
    change = model["l"].weight - before
    close(change[:, :3], change[:, 3:6])
    close(change[:, :1], change[:, 6:])


def test_all_linear_leaves_out_layers_narrower_than_a_shard():
    model = nn.ModuleDict({"narrow": nn.Linear(2, 5), "wide": nn.Linear(5, 5), "head": nn.Linear(5, 5)})
    report = lp.inspect(model, miss(exclude=["head"]))
    assert list(report.modules) == ["wide"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 9, "targets": ["0"]}, r"r=9 is above the 8 columns of '0' \(12x8\): lower r"),
        ({"variant": "bat", "r": 5}, "r=5 does not divide the 12 rows of '0'.*choose a divisor of 12"),
        ({"variant": "bat", "r": 6, "targets": ["0"]}, "r=6 does not divide the 8 columns of '0'"),
        ({"variant": "mini", "mini_r": 5}, "mini_r=5 does not divide the 12 rows of '0'"),
        ({"variant": "bat", "dropout": 0.1}, "dropout=0.1 is not supported with variant='bat'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lp.apply(net(), miss(**options))


def test_what_peft_does_not_adapt_is_kept_in_our_own_form(tmp_path):
    base = nn.Sequential(nn.Conv1d(4, 6, 3))
    lp.apply(model := copy.deepcopy(base), miss(targets=["0"]))
    perturb(model)
    lp.save_adapter(model, tmp_path)
    lp.load_adapter(base, tmp_path)
    x = torch.randn(2, 4, 9)
    close(base(x), model(x))
