"""OFT: the matrices are rotations; outputs equal PEFT's where PEFT is right, and the matrix reference elsewhere."""

import copy

import peft
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
from tests.methods.tiny import Classifier, trainer

COUNT = 2 * 6 + 3 * 6 + 3 * 6  # blocks of 4 on 8, 12 and 12 columns


def oft(**options):
    return lp.OFT(**(options if "r" in options else {"block_size": 4, **options}))


@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": True}, {"block_share": True}, {"r": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, options):
    """Outputs equal those of the rotated weight: stride, dilation, padding modes, groups, non-square kernels, 4-D
    inputs.
    """
    check_against_matrix(oft, kind, **options)


def test_invariants():
    check_invariants(oft, COUNT)


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(oft)


def test_fit():
    check_fit(lambda: oft(dropout=0.3))


# With 3 terms, PEFT computes 4 (a loop adds one power too many), so 3 is left out.
@pytest.mark.parametrize("terms", [0, 2, 4, 5, 7])
@pytest.mark.parametrize("case", ["linear", "share", "r", "embedding", "pointwise", "coft", "coft share"])
def test_parity_with_peft(case, terms):
    torch.manual_seed(0)
    name, options, theirs = "oft_R.default.weight", {"block_size": 4}, {"r": 0, "oft_block_size": 4}
    base, x, targets = net(), torch.randn(2, 5, 8), ["0", "2", "4"]
    if case == "share":
        options, theirs = options | {"block_share": True}, theirs | {"block_share": True}
    elif case.startswith("coft"):
        also = {"coft": True, "eps": 0.2, "block_share": case.endswith("share")}
        options, theirs = options | also, theirs | also
    elif case == "r":
        options, theirs = {"r": 2}, {"r": 2, "oft_block_size": 0}
    elif case == "embedding":
        name = "oft_embedding_R.default.weight"
        base, x = nn.Sequential(nn.Embedding(9, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randint(0, 9, (3, 5))
        targets = ["0"]
    elif case == "pointwise":
        base = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1))
        x, targets = torch.randn(2, 4, 3, 3), ["0", "2"]
    cayley = {"use_cayley_neumann": terms > 0} | ({"num_cayley_neumann_terms": terms} if terms else {})
    config = peft.OFTConfig(target_modules=targets, **theirs, **cayley)
    check_parity(oft(targets=targets, **options, **cayley), config, base, x, {"oft_R": name})


def test_the_rotation_is_one():
    model = net()
    lp.apply(model, oft())
    perturb(model, scale=2.0)
    before = model[2].weight.detach().clone()
    r = model[2].adapters["default"].rotation()
    close(r @ r.mT, torch.eye(4).expand_as(r))
    close(torch.linalg.det(r), torch.ones(3))
    lp.merge(model)
    after = model[2].weight.detach()
    close(after @ after.T, before @ before.T)  # lengths and angles of the rows


def test_the_series_nears_the_inverse():
    for terms, error in ((3, 1e-2), (5, 1e-4), (9, 1e-6)):
        model, exact = net(), net()
        lp.apply(model, oft(use_cayley_neumann=True, num_cayley_neumann_terms=terms))
        lp.apply(exact, oft())
        perturb(model, scale=0.02)
        perturb(exact, scale=0.02)
        r, q = model[0].adapters["default"].rotation(), exact[0].adapters["default"].rotation().mT
        assert (r - q).abs().max() < error  # the series rotates in the opposite direction, as in PEFT


def test_three_adapters_and_lora_between():
    model, x = net(), torch.randn(2, 3, 4, 8)
    lp.apply(model, oft(), lp.LoRA(r=2, name="lora"), oft(name="second", use_cayley_neumann=True))
    perturb(model)
    y = model(x)
    lp.merge(model)
    close(model(x), y)


def test_one_of_two_is_folded_in_only_where_their_order_stays():
    model, x = net(), torch.randn(4, 8)
    lp.apply(model, lp.LoRA(r=2), oft(name="second"))
    perturb(model)
    y = model(x)
    with pytest.raises(lp.MergeError, match=r"'second' at '0' runs after 'default', .* change the result"):
        lp.merge(model, "second")
    close(model(x), y, 0)
    lp.merge(model, "default")
    close(model(x), y)
    lp.unmerge(model)
    lp.set_active(model, "second")
    alone = model(x)
    lp.merge(model, "second")
    close(model(x), alone)


def test_dropout_leaves_blocks_unturned():
    model, x = nn.ModuleDict({"l": nn.Linear(400, 3)}), torch.randn(2, 400)
    lp.apply(model, oft(targets=["l"], dropout=0.25))
    perturb(model)
    torch.manual_seed(0)
    r = model["l"].adapters["default"].rotation()
    still = (r == torch.eye(4)).all(-1).all(-1)
    assert 10 < still.sum() < 40
    model.eval()
    y = model["l"](x)
    model.train()
    lp.merge(model)
    close(model["l"](x), y)


def test_sizes_that_do_not_divide_are_reported():
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    report = lp.apply(model, lp.OFT(block_size=5, targets=["0"]))
    assert "0: 3 blocks of 4, since block_size=5 does not divide" in str(report.notes)
    prime = nn.Sequential(nn.Linear(131, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0' \(4x131\) cannot be divided .* about 4: .* sizes for 131 are 131"):
        lp.apply(prime, oft(targets=["0"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 4, "r": 2}, "both set the block size: remove one"),
        ({"block_size": 1}, "block_size must be an integer of at least 2"),
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"num_cayley_neumann_terms": 1}, "must be an integer of at least 2"),
        ({"dropout": 1}, "dropout must be a probability"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lp.OFT(**options)


def test_attention():
    model, x = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)}), torch.randn(2, 5, 8)
    plain = copy.deepcopy(model)
    lp.apply(model, oft(targets=["a"]))
    close(model["a"](x, x, x)[0], plain["a"](x, x, x)[0])
    perturb(model)
    y = model["a"](x, x, x)[0]
    lp.merge(model)
    close(model["a"](x, x, x)[0], y)


def test_a_convolution_is_turned_as_its_rows_are():
    """Compare with an explicit block_diag and inverse, on a layer with every option at once."""
    layer = nn.Conv2d(6, 8, (2, 4), stride=2, padding=(1, 2), dilation=2, groups=2, padding_mode="reflect").double()
    model, plain = nn.ModuleDict({"c": layer}), copy.deepcopy(layer)
    lp.apply(model, oft(targets=["c"], adapter_dtype="float64"))
    perturb(model)
    blocks = []
    for entries in layer.adapters["default"].oft_R.detach():
        q = torch.zeros(4, 4, dtype=torch.float64)
        q[0, 1], q[0, 2], q[0, 3], q[1, 2], q[1, 3], q[2, 3] = entries
        q, eye = q - q.T, torch.eye(4, dtype=torch.float64)
        blocks.append((eye - q) @ torch.linalg.inv(eye + q))
    with torch.no_grad():
        turned = plain.weight.flatten(1) @ torch.block_diag(*blocks).T
        plain.weight.copy_(turned.view_as(plain.weight))
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    close(layer(x), plain(x), 1e-11)


def test_constrained_blocks_stay_in_their_ball():
    model, x = net(), torch.randn(3, 8)
    lp.apply(model, oft(coft=True, eps=0.1))
    plain = model(x)
    perturb(model, scale=5.0)
    assert 1e-4 < (model(x) - plain).abs().max() < 0.5
    part = model[0].adapters["default"]
    assert part.oft_R.norm() > 1
    turned = (part.rotation() - torch.eye(4)).flatten(1).norm(dim=1)
    radius = 0.1 / part.blocks**0.5
    assert ((turned < 2 * radius) & (turned > radius)).all()  # R - I is close to -2 Q


def test_what_is_saved_is_what_is_computed_with(tmp_path):
    model, x = net(), torch.randn(3, 8)
    lp.apply(model, oft(coft=True, eps=0.1))
    perturb(model, scale=5.0)  # as an optimizer's step does, without a Trainer
    lp.save_adapter(model, tmp_path)
    loaded = net()
    lp.load_adapter(loaded, tmp_path, trainable=True)
    torch.testing.assert_close(loaded(x), model(x))
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    perturb(loaded, scale=5.0)  # training continues inside the ball
    assert (loaded(x) - net()(x)).abs().max() < 0.5


def test_training_keeps_the_constrained_entries_themselves_in_the_ball():
    model, method = Classifier(), lp.OFT(4, targets=["qkv"], coft=True, eps=0.01, trainable=["head"])
    trainer(".", method, epochs=3).fit(model)
    parts = method.adapters_by_weight(model)
    assert len(parts) == 3
    for part in parts.values():
        norms = 2**0.5 * part.oft_R.detach().norm(dim=-1)
        assert (norms <= 0.01 / part.blocks**0.5 * 1.0001).all()
        assert (norms > 0.001).any()
