"""Compare a recomputed function with the function: values, first and second gradients, stored tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_peft.ops.recompute import recomputed
from tests.helpers import close


def _function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ a) @ b


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (3, 4), (4, 5), (5, 2)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def test_finite_differences_of_both_orders():
    inputs = _inputs()
    assert torch.autograd.gradcheck(lambda *t: recomputed(_function, *t), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: recomputed(_function, *t), inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen: int):
    inputs = _inputs()
    inputs[frozen].requires_grad_(False)
    wanted = [t for t in inputs if t.requires_grad]
    ours = torch.autograd.grad(recomputed(_function, *inputs).sum(), wanted)
    for mine, reference in zip(ours, torch.autograd.grad(_function(*inputs).sum(), wanted)):
        close(mine, reference, 1e-12)


@pytest.mark.parametrize("again", [False, True])
def test_an_input_that_another_is_made_of_is_not_counted_twice(again: bool):
    a = torch.randn(4, dtype=torch.float64, requires_grad=True)
    difference = a - 1
    output = recomputed(torch.mul, a, difference).sum()
    (gradient,) = torch.autograd.grad(output, a, create_graph=again)
    close(gradient.detach(), (2 * a - 1).detach(), 1e-12)


def test_under_autocast_computes_in_its_type():
    inputs = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = _function(*inputs), recomputed(_function, *inputs)
    assert output.dtype == torch.bfloat16
    ours = torch.autograd.grad(output.float().sum(), inputs)  # outside of autocast, as training does
    for mine, reference in zip(ours, torch.autograd.grad(expected.float().sum(), inputs)):
        assert mine.dtype == torch.float32
        close(mine, reference, 1e-6)


def test_stores_only_its_inputs():
    inputs, kept = _inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recomputed(_function, *inputs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}
