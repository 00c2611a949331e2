"""Test swapping the class of an object in place."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.core.class_swap import (
    SwapError,
    add_mixin,
    check_mixin,
    has_mixin,
    original_class,
    remove_mixin,
    restore_class,
)
from lightning_peft.tasks import TextClassifier


class Loud(nn.Module):
    def forward(self, x):
        return ("loud", super().forward(x))


class Late(nn.Module):
    def forward(self, x):
        return ("late", super().forward(x))


class Own(nn.Identity):
    """A user's subclass."""

    def __init__(self, tag):
        super().__init__()
        self.tag = tag


def test_the_object_keeps_identity_and_type():
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


def test_the_class_has_the_original_name_and_jsonargparse_finds_the_original():
    module = TextClassifier("demo")
    add_mixin(module, Loud)
    assert (type(module).__name__, str(type(module))) == ("TextClassifier", str(TextClassifier))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    # "Multiple subclasses with name TextClassifier", if the swapped class counted as another one
    assert parser.parse_args(["--model=TextClassifier"]).model.class_path == "lightning_peft.tasks.TextClassifier"


def test_an_inherited_mixin_does_not_count_as_added():
    class Born(Loud, nn.Identity):
        pass

    assert not has_mixin(Born(), Loud)
    assert original_class(Born()) is Born


def test_restore_removes_every_mixin_and_leaves_plain_objects_unchanged():
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


T = TypeVar("T")


class Empty:
    __slots__ = ()


class OneSlot:
    __slots__ = ("tag",)


class Registered:
    """A base class that registers its subclasses, and requires an argument from them."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, key: str, **kwargs):
        Registered.known.append(key)


def first_bases() -> list[type]:
    class Abstract(ABC, nn.Linear):
        pass

    class Parametrised(Generic[T], nn.Linear):
        pass

    class Slotted(Empty, nn.Linear):
        pass

    class WithSlot(OneSlot, nn.Linear):
        pass

    class SlottedItself(nn.Linear):
        __slots__ = ("tag",)

    class Locked(nn.Linear):
        def __setattr__(self, name, value):
            if name not in ("in_features", "out_features", "training") and not isinstance(value, nn.Parameter):
                raise AttributeError(f"{name!r} cannot be set")
            super().__setattr__(name, value)

    class Plain(nn.Linear, Empty):
        pass

    class Listed(Registered, nn.Linear, key="listed"):
        pass

    return [Abstract, Parametrised, Slotted, WithSlot, SlottedItself, Locked, Plain, Listed]


@pytest.mark.parametrize("cls", first_bases(), ids=lambda cls: cls.__name__)
def test_any_first_base(cls: type):
    module = cls(2, 3)
    known = list(Registered.known)
    keys = list(module.state_dict())
    plain = module(torch.ones(2))
    add_mixin(module, Loud)
    add_mixin(module, Late)
    assert isinstance(module, cls)
    assert isinstance(module, Loud)
    assert list(module.state_dict()) == keys
    late, (loud, output) = module(torch.ones(2))
    assert (late, loud) == ("late", "loud")
    assert output.equal(plain)
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert twin(torch.ones(2))[1][1].equal(plain)
    restore_class(module)
    assert type(module) is cls
    assert Registered.known == known


def test_a_subclass_of_a_swapped_class_is_resolved_as_usual():
    module = Own("a")
    add_mixin(module, Loud)
    module.__class__ = type(
        "Sharded", (type(module),), {"forward": lambda self, x: ("sharded", super(type(self), self).forward(x))}
    )
    assert module(1) == ("sharded", ("loud", 1))


class Closed(type):
    def __new__(mcs, name, bases, namespace):
        if any(isinstance(base, Closed) for base in bases):
            raise TypeError("closed for derivation")
        return super().__new__(mcs, name, bases, namespace)


class Final(nn.Linear, metaclass=Closed):
    pass


def test_a_class_that_allows_no_subclass_is_refused_and_left():
    module = Final(2, 3)
    for change in (add_mixin, check_mixin):
        with pytest.raises(SwapError, match="Final cannot be changed in place: closed for derivation"):
            change(module, Loud)
        assert type(module) is Final


def test_checking_changes_nothing():
    module = Own("a")
    add_mixin(module, Loud)
    before = type(module)
    check_mixin(module, Late)
    check_mixin(module, Loud)
    assert type(module) is before
