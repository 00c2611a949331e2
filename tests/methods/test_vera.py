"""VeRA: shared random matrices, stored once, and the two vectors."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_peft as lp
from lightning_peft.core.state.state_dict import load_state
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

R, COUNT = 5, 3 * 5 + 12 + 12 + 8


class Shapes(TorchDispatchMode):
    """Records the shapes of the results of matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add(out.shape)
        return out


def vera(**options):
    return lp.VeRA(**{"r": R, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind):
    check_against_matrix(vera, kind)


@pytest.mark.parametrize("save", [True, False])
def test_invariants(save):
    check_invariants(lambda **o: vera(save_projection=save, **o), COUNT)


def test_checkpointing_and_compile():
    check_checkpointed_and_compiled(vera)


@pytest.mark.parametrize("save", [True, False])
def test_fit(save):
    check_fit(lambda: vera(save_projection=save, dropout=0.2))


@pytest.mark.parametrize("case", ["linear", "Conv1D"])
def test_parity_with_peft(case):
    """The same projections from the same seed, so only the vectors need copying."""
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    if case == "linear":
        base, x, targets, options = net(), torch.randn(2, 5, 8), ["0", "2", "4"], {}
    else:
        base, x = nn.Sequential(Conv1D(6, 8), nn.Tanh(), Conv1D(4, 6)), torch.randn(4, 8)
        targets, options = ["0", "2"], {"fan_in_fan_out": True}
    config = peft.VeraConfig(r=R, target_modules=targets, projection_prng_key=3, **options)
    names = {f"vera_lambda_{n}": f"vera_lambda_{n}.default" for n in "bd"}
    check_parity(vera(targets=targets, projection_seed=3), config, base, x, names)


def test_one_copy_for_the_model():
    model = net()
    lp.apply(model, vera())
    state = lp.adapter_state(model)
    assert [k for k in state if "projection" in k] == [f"0.adapters.default.projection.vera_{n}" for n in "AB"]
    assert state["0.adapters.default.projection.vera_A"].shape == (R, 12)
    for other in (model, copy.deepcopy(model)):
        shared = {id(other[i].adapters["default"]._shared[0]) for i in (0, 2, 4)}
        assert shared == {id(other[0].adapters["default"].projection)}
    lean = net()
    lp.apply(lean, vera(save_projection=False))
    assert sum(v.numel() for v in lp.adapter_state(lean).values()) == COUNT + 16


def test_projections_come_with_the_file():
    model, other, x = net(), net(), torch.randn(3, 8)
    lp.apply(model, vera(projection_seed=1))
    perturb(model)
    lp.apply(other, vera(projection_seed=2))
    load_state(other, lp.adapter_state(model))
    assert torch.equal(other(x), model(x))


def test_projections_of_another_seed_are_refused():
    model, other = net(), net()
    lp.apply(model, vera(save_projection=False))
    lp.apply(other, vera(save_projection=False, projection_seed=1))
    with pytest.raises(RuntimeError, match=r"projection\.sample: projection_seed does not reproduce"):
        load_state(other, lp.adapter_state(model))


def test_the_projections_depend_on_their_seed_alone():
    one, two = net(), net()
    lp.apply(one, vera(seed=1))
    torch.manual_seed(5)
    lp.apply(two, vera(seed=2, name="other"))
    close(one[0].adapters["default"].projection.vera_A, two[0].adapters["other"].projection.vera_A, 0)


def test_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x):
            return torch.einsum("bi,eoi->beo", x, self.w)

    model = nn.ModuleDict({"e": Experts()})
    assert lp.apply(model, vera(targets="e.w")).trainable == 3 * (R + 6)
    perturb(model)
    x = torch.randn(2, 4)
    y = model["e"](x)
    lp.merge(model)
    close(model["e"](x), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"d_initial": 0}, "d_initial must be a finite number other than 0, got 0"),
        ({"projection_seed": "a"}, "projection_seed must be an integer, got 'a'"),
        ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\), got 1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        vera(**options)


def test_the_update_is_the_papers():
    model = net()
    lp.apply(model, vera())
    perturb(model)
    shared = model[0].adapters["default"].projection
    for i, (rows, columns) in {0: (12, 8), 2: (12, 12), 4: (8, 12)}.items():
        adapter, before = model[i].adapters["default"], model[i].weight.detach().clone()
        update = (
            torch.diag(adapter.vera_lambda_b)
            @ shared.vera_B[:rows]
            @ torch.diag(adapter.vera_lambda_d)
            @ shared.vera_A[:, :columns]
        )
        lp.merge(model)
        close(model[i].weight.detach(), (before + update).detach())
        lp.unmerge(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_few_and_many_tokens_give_the_same(dtype):
    """For up to r tokens, the vectors multiply activations; for more tokens, they multiply the matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).to(dtype)
    lp.apply(model, vera(targets=["0"]))
    perturb(model)
    x = torch.randn(3 * R, 6, dtype=dtype, requires_grad=True)
    parameters = lp.trainable_parameters(model)
    many = model(x)
    few = torch.cat([model(part) for part in x.split(R)])
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    assert few.dtype == many.dtype == dtype
    close(few.float(), many.float(), tolerance)
    grad = torch.randn_like(many)
    got, expected = (torch.autograd.grad(y, [x, *parameters], grad) for y in (few, many))
    for ours, theirs in zip(got, expected, strict=True):
        close(ours.float(), theirs.float(), tolerance * 4)


def test_few_tokens_need_no_gradient_of_the_matrix():
    model = nn.Sequential(nn.Linear(6, 8))
    lp.apply(model, vera(targets=["0"]))
    out = model(torch.randn(R, 6))
    with Shapes() as shapes:
        out.sum().backward()
    assert torch.Size([8, R]) not in shapes.seen
