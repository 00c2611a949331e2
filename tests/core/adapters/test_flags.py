"""Flags of adapter classes follow what a subclass overrides, so that a shortcut never skips its code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import close, perturb


class Thin(lp.LowRankAdapter):
    def __init__(self, site):
        super().__init__(site)
        rows, columns = site.shape
        self.a = nn.Parameter(torch.randn(2, columns))
        self.b = nn.Parameter(torch.zeros(rows, 2))

    def factors(self):
        return self.a, self.b


class Hadamard(Thin):
    """Not a low-rank product any more: the inherited output and low_rank would leave out the factor W."""

    def delta(self, weight):
        return weight * super().delta(weight)


class Shifted:
    """A mixin, which is not an adapter itself."""

    def output(self, host, x, y):
        return super().output(host, x, y) + 1


class ShiftedThin(Shifted, Thin):
    pass


class Again(Thin):
    """Overrides output and states that it is still the product."""

    output_is_product = True

    def output(self, host, x, y):
        return super().output(host, x, y)


class Below(Again):
    def output(self, host, x, y):
        return super().output(host, x, y) + 1


class Around(Thin):
    def run(self, host, call, *args, **kwargs):
        return super().run(host, call, *args, **kwargs) + 1


FLAGS = ("has_output", "transform_is_sum", "run_is_forward_and_after", "delta_is_product", "output_is_product")


@pytest.mark.parametrize(
    ("cls", "unset"),
    [
        (Thin, ()),
        (Hadamard, ("has_output", "delta_is_product", "output_is_product")),
        (ShiftedThin, ("output_is_product",)),
        (Again, ()),
        (Below, ("output_is_product",)),
        (Around, ("run_is_forward_and_after",)),
    ],
)
def test_flags(cls, unset):
    assert [flag for flag in FLAGS if not getattr(cls, flag)] == list(unset)


def method(adapter):
    class Method(lp.WeightMethod):
        def build(self, site):
            return adapter(site)

    return Method


@pytest.mark.parametrize("adapter", [Thin, Hadamard])
def test_an_inherited_output_does_not_hide_a_new_delta(adapter):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), torch.randn(5, 4)
    lp.apply(model, method(adapter)(targets=["0"]))
    perturb(model)
    adapted = model(x)
    lp.merge(model)
    close(model(x), adapted)


@pytest.mark.parametrize("adapter", [Thin, Hadamard, ShiftedThin, Below, Around])
def test_rows_run_what_a_subclass_overrides(adapter):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), torch.randn(3, 4)
    make = method(adapter)
    lp.apply(model, make(targets=["0"], name="a"), make(targets=["0"], name="b"))
    perturb(model)
    expected = []
    for name, row in zip(("a", "b"), x):
        with lp.active(model, name):
            expected.append(model(row[None]))
    with lp.disabled(model):
        expected.append(model(x[2:]))
    with lp.rows(model, ["a", "b", None]):
        close(model(x), torch.cat(expected))
