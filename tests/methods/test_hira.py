"""HiRA compared with PEFT and the matrix; files in both directions; errors."""

import copy
import json

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


def hira(**options):
    return lp.HiRA(**{"r": 3, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind):
    check_against_matrix(hira, kind)


def test_invariants():
    check_invariants(hira, 3 * (20 + 24 + 20))


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(hira)


def test_fit():
    check_fit(lambda: hira(dropout=0.3))


def grid():
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(45, 3))


@pytest.mark.parametrize(
    ("base", "targets", "x", "prefix"),
    [
        (net(), ["0", "2", "4"], torch.randn(2, 5, 8), "hira_"),
        (grid(), ["0", "1", "3"], torch.randn(2, 4, 8, 8), "hira_"),
        (nn.Sequential(nn.Embedding(9, 6)), ["0"], torch.tensor([[1, 8, 1], [0, 3, 3]]), "hira_embedding_"),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_parity_with_peft(base, targets, x, prefix):
    peft = pytest.importorskip("peft")
    names = {f"hira_{factor}": f"{prefix}{factor}.default" for factor in "AB"}
    check_parity(hira(targets=targets), peft.HiraConfig(r=3, target_modules=targets), base, x, names)


def test_files_of_peft_load_here_and_go_back(tmp_path):
    peft = pytest.importorskip("peft")
    base, x = llama(), tokens()
    targets = ["q_proj", "k_proj", "down_proj", "embed_tokens"]
    # PEFT stores rank_pattern and does not apply it.
    config = peft.HiraConfig(
        r=4, hira_dropout=0.1, target_modules=targets, rank_pattern={"k_proj": 2}, init_weights=False
    )
    theirs = logits(made_by_peft(base, config, tmp_path / "theirs"), x)
    assert not torch.allclose(theirs, logits(base, x), atol=1e-3)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    close(logits(here, x), theirs, 1e-4)
    lp.save_adapter(here, tmp_path / "again")
    close(logits(read_by_peft(base, tmp_path / "again"), x), theirs, 1e-4)


def test_files_of_a_convolution_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, x, targets = grid().eval(), torch.randn(2, 4, 8, 8), ["0", "1", "3"]
    config = peft.HiraConfig(r=2, target_modules=targets, init_weights=False)
    theirs = made_by_peft(base, config, tmp_path / "theirs")(x)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    close(here.eval()(x), theirs, 1e-5)
    lp.save_adapter(here, tmp_path / "again")
    close(read_by_peft(base, tmp_path / "again")(x), theirs, 1e-5)


def test_ranks_that_differ_are_kept_in_our_own_form(tmp_path):
    base, x = net(), torch.randn(5, 8)
    lp.apply(model := copy.deepcopy(base), hira(rank_pattern={"2": 2}))
    perturb(model)
    lp.save_adapter(model, tmp_path)
    assert "does not apply it" in json.loads((tmp_path / "adapter_config.json").read_text())["reason"]
    lp.load_adapter(base, tmp_path)
    close(base(x), model(x))


@pytest.mark.parametrize("layer", ["linear", "Conv1D", "pointwise", "reflect"])
def test_dropout_is_on_the_update_only(layer):
    build, inputs = KINDS[layer]
    plain, x = nn.ModuleDict({"layer": build()}), inputs()
    model = copy.deepcopy(plain)
    lp.apply(model, hira(targets=["layer"], dropout=0.5))
    close(model["layer"](x), plain["layer"](x))
    perturb(model)
    drawn = torch.stack([model["layer"](x) for _ in range(3000)])
    kept = model.eval()["layer"](x)
    assert (drawn[0] - kept).abs().max() > 1e-2
    assert (drawn.mean(0) - kept).abs().max() < 0.1 * (kept - plain["layer"](x)).abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 13, "targets": ["0"]}, r"r=13 is above both sides of '0' \(12x8\).*Lower r"),
        ({"rank_pattern": {"9": 2}}, "rank_pattern: '9' matches nothing"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lp.apply(net(), hira(**options))


def test_no_dropout_on_a_grouped_convolution():
    with pytest.raises(ValueError, match=r"dropout=0\.1 is not supported on '0', a transposed or grouped convolution"):
        lp.apply(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), hira(targets=["0"], dropout=0.1))
