"""Compare the fused dropout with its reference and finite differences, and check what it stores for backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.ops.dropout import dropped, dropped_reference
from tests.helpers import close

PROJECTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (3, 4, 6), (2, 6)),
    "conv": (lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2), (2, 4, 5, 5), (6, 2, 3, 3)),
    "reflect": (lambda x, w: F.conv1d(F.pad(x, (2, 2), mode="reflect"), w), (2, 4, 7), (3, 4, 3)),
}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def _seeded(x: Tensor, w: Tensor, project: Callable[[Tensor, Tensor], Tensor], p: float = 0.4) -> Tensor:
    torch.manual_seed(3)  # the same mask each time
    return dropped(project, x, w, p)


def _mask(x: Tensor) -> Tensor:
    return _seeded(torch.ones_like(x), torch.ones((), dtype=x.dtype), torch.mul).detach() != 0


@pytest.mark.parametrize("project", PROJECTS)
def test_finite_differences(project: str):
    function, x_shape, w_shape = PROJECTS[project]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _seeded(x, w, function), (x, w))


@pytest.mark.parametrize("project", PROJECTS)
def test_second_derivatives(project: str):
    function, x_shape, w_shape = PROJECTS[project]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: _seeded(x, w, function), (x, w))


def test_a_linear_projection_is_not_repeated_in_backward():
    x, w = torch.randn(8, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    with Products() as products:
        dropped(F.linear, x, w, 0.4).sum().backward()
    assert products.count == 3  # one in forward, and one for each gradient


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("needs", ["x", "w", "both"])
def test_equals_a_mask_by_hand(project: str, needs: str):
    function, x_shape, w_shape = PROJECTS[project]
    x, w = torch.randn(x_shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64)
    x.requires_grad_(needs != "w")
    w.requires_grad_(needs != "x")
    keep = _mask(x)
    expected = function(x * keep / 0.6, w)
    output = _seeded(x, w, function)
    close(output, expected, 1e-12)
    grad = torch.randn_like(expected)
    wanted = [t for t in (x, w) if t.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(output, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        close(ours, theirs, 1e-12)


def test_has_the_distribution_of_dropout():
    x, w = torch.ones(200_000, 1), torch.ones(1, 1)
    for function in (dropped, dropped_reference):
        y = function(F.linear, x, w, 0.25)
        assert abs((y == 0).double().mean() - 0.25) < 0.01
        assert abs(y.double().mean() - 1) < 0.01
        assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_computes_and_differentiates_in_its_type(dtype: torch.dtype):
    x = torch.randn(8, 6, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = _seeded(x, w, F.linear)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # outside of autocast, as training does
    assert (x.grad.dtype, w.grad.dtype) == (dtype, torch.float32)
    keep = _mask(x)
    close(w.grad, (x * keep / 0.6).float().sum(0).expand_as(w), 0.05)
    close(x.grad.float(), (w.sum(0) * keep / 0.6).float(), 0.05)


@pytest.mark.parametrize("frozen_input", [False, True])
def test_keeps_a_byte_for_each_element_and_no_copy_of_the_input(frozen_input: bool):
    def saved(function: Callable[..., Tensor]) -> list[Tensor]:
        x = torch.randn(16, 64, requires_grad=not frozen_input)
        w = torch.randn(2, 64, requires_grad=True)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            function(F.linear, x, w, 0.5)
        return [t for t in kept if t.data_ptr() not in (x.data_ptr(), w.data_ptr())]

    extra = saved(dropped)
    assert [(t.dtype, t.numel()) for t in extra] == [(torch.bool, 16 * 64)]
    assert sum(t.nbytes for t in extra) * 4 <= sum(t.nbytes for t in saved(dropped_reference))


def test_without_gradients_keeps_nothing():
    with torch.no_grad():
        y = dropped(F.linear, torch.randn(3, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True), 0.5)
    assert y.grad_fn is None
