"""Test how reserved words, patterns and ``exclude`` select modules, for all methods."""

from __future__ import annotations

import pytest
from torch import nn

import lightning_peft as lp
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.targeting.selection import select


def test_each_candidate_comes_with_the_first_pattern_that_names_it():
    modules = {name: nn.Identity() for name in ("a", "a.x", "b", "b.x", "c")}
    found = select(modules, ["x", "word", "a.x"], ["b"], {"word": lambda: ["c", "a.x"]})
    assert found == {"a.x": "x", "c": "word"}
    with pytest.raises(TargetError, match="excludes everything"):
        select(modules, "x", ["a", "b"])


METHODS = [
    lp.LoRA,
    lp.BottleneckAdapter,
    lp.NormTuning,
    lambda **options: lp.PrefixTuning(4, **options),
    lambda **options: lp.PromptTuning(4, init="random", **options),
]


@pytest.mark.parametrize("method", METHODS)
def test_all_patterns_that_match_nothing_are_listed(method):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    both = r"targets: 'self_atn' matches nothing; nearest: .*self_attn.*; 'nrom1' matches nothing; nearest: "
    with pytest.raises(lp.TargetError, match=both):
        lp.apply(model, method(targets=["self_atn", "nrom1"]))
    target = "norm1" if method is lp.NormTuning else "self_attn" if method is not METHODS[4] else "layers.0"
    with pytest.raises(lp.TargetError, match=r"exclude: 'self_atn' matches nothing; nearest: .*self_attn"):
        lp.apply(model, method(targets=target, exclude="self_atn"))
    assert not any("adapters" in name for name, _ in model.named_modules())
