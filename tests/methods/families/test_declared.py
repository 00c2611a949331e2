"""Arguments declared as fields: order, checks, inheritance, and constructors that a user writes by hand."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Literal

import attrs
import numpy as np
import pytest
from attrs import field

import lightning_peft as lp


class ByField(lp.LoRA):
    """LoRA with two more arguments."""

    alpha: float = 3  # redeclared
    steps: int = field(default=2, kw_only=False)
    mode: Literal["fast", "slow"] = "fast"


class ByHand(lp.LoRA):
    """LoRA with a constructor."""

    def __init__(self, steps: int = 2, **options) -> None:
        super().__init__(**options)
        self.steps = steps


class BelowByHand(ByHand):
    """Inherits a constructor."""


def test_a_redeclared_argument_keeps_its_place():
    assert list(inspect.signature(ByField).parameters)[:2] == ["r", "alpha"]
    method = ByField(4, steps=5)
    assert (method.r, method.alpha, method.steps) == (4, 3, 5)


def test_the_options_of_every_method_come_last():
    options = [a.name for a in attrs.fields(lp.PEFTMethod)]
    for cls in (ByField, lp.LoRA, lp.LastLayers, lp.BottleneckAdapter):
        assert [a.name for a in attrs.fields(cls)][-len(options) :] == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "quick"}, "mode must be one of 'fast', 'slow', got 'quick'"),
        ({"use_rslora": "yes"}, "use_rslora must be True or False, got 'yes'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be an integer of at least 1, got 0"),
        ({"alpha": 0}, "alpha must be a finite number other than 0, got 0"),  # the check of the redeclared field
        ({"r": True}, "r must be an integer of at least 1, got True"),
    ],
)
def test_a_check_names_argument_expectation_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        ByField(**arguments)


@pytest.mark.parametrize("cls", [ByField, ByHand, BelowByHand])
def test_config_builds_the_same_method_again(cls):
    method = cls(r=4, steps=7, name="other")
    assert method.config()["steps"] == 7
    assert cls(**method.config()).config() == method.config()
    assert pickle.loads(pickle.dumps(method)).config() == method.config()
    assert copy.deepcopy(method).config() == method.config()


def test_numpy_scalars_become_plain_values():
    config = lp.LoRA(np.int64(4), lora_plus_ratio=np.float64(2.0), rank_pattern={"q": np.int32(2)}).config()
    assert (type(config["r"]), type(config["lora_plus_ratio"]), type(config["rank_pattern"]["q"])) == (int, float, int)


def test_fields_below_a_constructor_written_by_hand_are_refused():
    with pytest.raises(TypeError, match="ByHand has a handwritten __init__, which would not set them"):

        class Mixed(ByHand):
            more: int = field(default=3)


def test_methods_with_equal_arguments_are_not_equal():
    assert lp.LoRA() != lp.LoRA()
    assert len({lp.LoRA(), lp.LoRA()}) == 2


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (lp.LoRA, {"rank": 8}, "LoRA does not have an argument 'rank': write r=8"),
        (lp.LoRA, {"r": 8, "lora_alpha": 16}, "'lora_alpha': write alpha=16"),
        (lp.DoRA, {"lora_dropout": 0.1}, "DoRA does not have an argument 'lora_dropout': write dropout=0.1"),
        (lp.HiRA, {"hira_dropout": 0.1}, "'hira_dropout': write dropout=0.1"),
        (lp.OFT, {"target_modules": ["q"]}, r"'target_modules': write targets=\['q'\]"),
        (lp.BitFit, {"modules_to_save": ["head"]}, r"'modules_to_save': write trainable=\['head'\]"),
        (lp.PrefixTuning, {"num_virtual_token": 3}, "'num_virtual_token': write num_virtual_tokens=3"),
        (lp.LoRA, {"target_modules": ["q_proj"] * 9}, "it is called targets here"),
        (lp.LoRA, {"use_dora": True}, "'use_dora': use lp.DoRA"),
        (lp.SSF, {"rank": 8}, "SSF does not have an argument 'rank': its arguments are targets, init"),
    ],
)
def test_an_unknown_argument_names_the_one_that_was_meant(method, given, said):
    with pytest.raises(TypeError, match=said):
        method(**given)


def test_a_method_with_a_handwritten_constructor_names_it_too():
    class Half(lp.LoRA):
        def __init__(self, **options):
            super().__init__(r=4, **options)

    assert Half(alpha=2).config()["alpha"] == 2
    with pytest.raises(TypeError, match="Half does not have an argument 'lora_alpha': write alpha=2"):
        Half(lora_alpha=2)
