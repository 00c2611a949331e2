"""Test target patterns and their error messages."""

from __future__ import annotations

import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.patterns import TargetError, as_patterns, match, match_modules
from tests.kinds import KINDS, MLP


class MyLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("self_attn.q_proj", "layers.0.self_attn.q_proj", True),
        ("q_proj", "layers.0.seq_proj", False),
        ("proj", "layers.0.q_proj", False),
        ("q_proj", "q_proj.inner", False),
        ("Q_proj", "layers.0.q_proj", False),
        ("layers.*.query", "encoder.layers.3.attention.query", True),
        ("encoder.layers.*.query", "encoder.layers.3.query", True),
        ("layers.[01].query", "encoder.layers.1.query", True),
        ("layers.[01].query", "encoder.layers.2.query", False),
        ("?_proj", "layers.0.q_proj", True),
        ("ayers.*.query", "layers.0.query", False),
        (r"re:layers\.[0-3]\.query", "layers.2.query", True),
        (r"re:layers\.[0-3]\.query", "encoder.layers.2.query", False),
        (r"re:.*\.query", "encoder.layers.2.query", True),
        ("type:Linear", "anything", True),
        ("type:MyLinear", "anything", True),
        ("type:Module", "anything", True),
        ("type:linear", "anything", False),
        ("type:Conv2d", "anything", False),
    ],
)
def test_match(pattern: str, name: str, expected: bool):
    assert match(pattern, name, MyLinear(2, 2)) is expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("q_proj,v_proj", r"several names in one string; write targets=\['q_proj', 'v_proj'\]"),
        (["up", "q_proj v_proj"], r"write targets=\['q_proj', 'v_proj'\]"),
        ("re:(", "'re:\\(' is not a valid regular expression"),
        ("", "non-empty strings, got ''"),
        ([None], "non-empty strings, got None"),
    ],
)
def test_malformed_patterns_are_refused(patterns, message: str):
    with pytest.raises(TargetError, match=f"targets.*{message}"):
        as_patterns(patterns, "targets")
    with pytest.raises(TargetError, match=message):
        lp.LoRA(targets=patterns)


def test_a_regular_expression_may_hold_commas():
    assert as_patterns("re:a{1,2}", "targets") == ("re:a{1,2}",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["up", "dwon"]}, "targets: 'dwon' matches nothing; nearest: down"),
        ({"targets": "type:Liner"}, "'type:Liner' matches nothing; nearest: type:Linear"),
        ({"targets": "type:Conv2d"}, "'type:Conv2d' matches nothing; nearest: type:Linear"),
        ({"targets": "xyz"}, "'xyz' matches nothing; nearest: down, head, mid, up"),
        ({"targets": "UP"}, "'UP' matches nothing; nearest: .*up"),
        ({"exclude": "dwon"}, "exclude: 'dwon' matches nothing; nearest: down"),
        ({"trainable": ["haed"]}, "trainable: 'haed' matches nothing; nearest: head"),
        ({"targets": "up", "exclude": "up"}, "exclude='up' excludes everything that targets='up' matches"),
        ({"targets": "up", "trainable": "up"}, r"'up' matches only modules that train in full, \['up'\]"),
        ({"rank_pattern": {"dwon": 2}}, "rank_pattern: 'dwon' matches nothing; nearest: down"),
        ({"alpha_pattern": {"head": 2}}, "alpha_pattern: 'head' matches nothing"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(arguments: dict, message: str):
    model = MLP()
    with pytest.raises(TargetError, match=message):
        lp.apply(model, lp.LoRA(r=2, **arguments))
    with pytest.raises(TargetError, match=message):
        lp.inspect(model, lp.LoRA(r=2, **arguments))
    assert all(p.requires_grad for p in model.parameters())


def test_modules_are_found_in_model_order():
    assert list(match_modules(MLP(), ("type:Linear",), "trainable")) == ["up", "mid", "down", "head"]
    assert list(match_modules(MLP(), ("head", "up"), "trainable")) == ["up", "head"]


def test_adapters_are_not_part_of_the_base():
    model = KINDS["mha"].build()
    before = [name for name, _ in base_modules(model)]
    lp.apply(model, lp.LoRA(r=2))
    assert [name for name, _ in base_modules(model)] == before


def test_a_base_module_called_adapters_stays_one():
    model = nn.ModuleDict({"adapters": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    assert [name for name, _ in base_modules(model)] == ["", "adapters", "body"]
    assert set(lp.apply(model, lp.LoRA(r=1, targets="adapters")).modules) == {"adapters"}
