"""Swapping an object's class in place."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

from lightning_peft.core.swap import add_mixin, has_mixin, original_class, remove_mixin, restore_class


class Loud(nn.Module):
    def forward(self, x):
        return ("loud", super().forward(x))


class Late(nn.Module):
    def forward(self, x):
        return ("late", super().forward(x))


class Own(nn.Identity):
    """A subclass of a user."""

    def __init__(self, tag):
        super().__init__()
        self.tag = tag


def test_the_object_stays_what_it_was():
    module = Own("a")
    before = vars(module)
    add_mixin(module, Loud)
    assert vars(module) is before
    assert isinstance(module, Own)
    assert isinstance(module, Loud)
    assert original_class(module) is Own
    assert type(module).__name__ == "Own"
    assert type(module).__module__ == Own.__module__
    assert module(1) == ("loud", 1)


def test_adding_twice_is_adding_once_and_the_last_is_outermost():
    module = Own("a")
    for mixin in (Loud, Loud, Late):
        add_mixin(module, mixin)
    assert module(1) == ("late", ("loud", 1))
    remove_mixin(module, Loud)
    assert module(1) == ("late", 1)
    assert not has_mixin(module, Loud)
    remove_mixin(module, Late)
    assert type(module) is Own


def test_classes_are_cached_and_no_other_object_changes():
    one, two, three = Own(1), Own(2), Own(3)
    add_mixin(one, Loud)
    add_mixin(two, Loud)
    assert type(one) is type(two) is not type(three) is Own


def test_inheriting_is_not_having_been_given():
    class Born(Loud, nn.Identity):
        pass

    assert not has_mixin(Born(), Loud)
    assert original_class(Born()) is Born


def test_restore_takes_every_mixin_away_and_leaves_plain_objects_alone():
    module, plain = Own("a"), Own("b")
    add_mixin(module, Loud)
    add_mixin(module, Late)
    restore_class(module)
    restore_class(plain)
    assert type(module) is type(plain) is Own


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling(protocol: int):
    module = Own("a")
    add_mixin(module, Loud)
    add_mixin(module, Late)
    twin = pickle.loads(pickle.dumps(module, protocol))
    assert type(twin) is type(module)
    assert twin.tag == "a"
    assert twin(1) == module(1)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copying(copied):
    module = Own(["a"])
    add_mixin(module, Loud)
    twin = copied(module)
    assert type(twin) is type(module)
    assert twin.tag == ["a"]
    restore_class(twin)
    assert has_mixin(module, Loud)
