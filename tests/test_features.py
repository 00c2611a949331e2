"""Test every cell of docs/support.md: each feature works, and each hole is refused with its reason."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files, write_files
from tests.features import FEATURES, HOLES, ROWS, Row
from tests.formats.models import llama, made_by_peft, moved, read_by_peft
from tests.helpers import assert_same_bits, bits, close, differ, perturb

DOCS = Path(__file__).parents[1] / "docs"


@functools.cache
def _base(kind: str) -> nn.Module:
    torch.manual_seed(5)
    if kind == "llama":
        return moved(llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False))
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)).eval()


def base(row: Row) -> nn.Module:
    return copy.deepcopy(_base(row.base))


def inputs(row: Row, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    if row.base == "vit":
        return torch.randn(n, 3, 16, 16, generator=generator)
    return torch.randint(1, 64, (n, 7), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of the user's tokens, without those that PEFT's prompts add."""
    out = model(x).logits
    return out[:, -x.shape[1] :] if out.ndim == 3 else out


def trained(row: Row, name: str = "default", seed: int = 7) -> nn.Module:
    model = base(row)
    lp.apply(model, row.make(name))
    torch.manual_seed(seed)
    return moved(model)


def loaded(row: Row, folder: Path, *names: str) -> nn.Module:
    """A base with adapters that were trained, saved and loaded."""
    model = base(row)
    for seed, name in enumerate(names):
        lp.save_adapter(trained(row, name, seed), folder / name)
        lp.load_adapter(model, folder / name)
    return model


def alone(model: nn.Module, name: str | None, x: Tensor) -> Tensor:
    with lp.active(model, *filter(None, [name])):
        return logits(model, x)


def save_and_load(row: Row, folder: Path) -> None:
    model, x = trained(row), inputs(row)
    lp.save_adapter(model, folder)
    again = base(row)
    lp.load_adapter(again, folder)
    close(logits(again, x), logits(model, x))
    differ(logits(again, x), logits(base(row), x))


def to_peft(row: Row, folder: Path) -> None:
    model, x = trained(row), inputs(row)
    lp.save_adapter(model, folder)
    close(logits(read_by_peft(base(row), folder), x), logits(model, x), 1e-4)


def from_peft(row: Row, folder: Path) -> None:
    kind, options = row.theirs
    made_by_peft(base(row), getattr(peft, kind)(**options), folder)
    model, x = base(row), inputs(row)
    lp.load_adapter(model, folder)
    close(logits(model, x), logits(read_by_peft(base(row), folder), x), 1e-4)
    differ(logits(model, x), logits(base(row), x))


def merge(row: Row, folder: Path) -> None:
    model, x = loaded(row, folder, "a"), inputs(row)
    want = logits(model, x)
    lp.merge(model)
    close(logits(model, x), want, 1e-4)
    plain = lp.unload(model, merge=True)
    assert plain.state_dict().keys() == base(row).state_dict().keys()
    close(logits(plain, x), want, 1e-4)


def unmerge(row: Row, folder: Path) -> None:
    model = loaded(row, folder, "a")
    before = bits(model)
    lp.merge(model)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lp.unmerge(model)
    assert_same_bits(bits(model), before)


def rows(row: Row, folder: Path) -> None:
    model, x, names = loaded(row, folder, "a", "b"), inputs(row), ["b", None, "a", "lora"]
    lp.apply(model, lp.LoRA(r=3, name="lora"))
    perturb(model, name="lora")
    want = torch.cat([alone(model, name, x[i : i + 1]) for i, name in enumerate(names)])
    with lp.rows(model, names):
        close(logits(model, x), want, 1e-4)
    differ(alone(model, "a", x), alone(model, "b", x))


def combine(row: Row, folder: Path) -> None:
    """Against the bases that merging makes: base + sum_i w_i (merged_i - base)."""
    model, x, shares = loaded(row, folder, "a", "b"), inputs(row), {"a": 0.75, "b": -0.5}
    lp.combine(model, list(shares), list(shares.values()), name="mix")
    plain = base(row).state_dict()
    want = {key: value.double() for key, value in plain.items()}
    for name, share in shares.items():
        one = copy.deepcopy(model)
        lp.set_active(one, name)
        for key, value in lp.unload(one, merge=True).state_dict().items():
            want[key] += share * (value.double() - plain[key].double())
    reference = base(row)
    reference.load_state_dict(want)
    close(alone(model, "mix", x), logits(reference, x), 1e-3)
    differ(alone(model, "mix", x), logits(base(row), x))


SHOWN: dict[str, Callable[[Row, Path], None]] = dict(
    zip(FEATURES, (save_and_load, to_peft, from_peft, merge, unmerge, rows, combine), strict=True)
)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("row", [pytest.param(name, id=name.replace("/", "")) for name in ROWS])
def test_cell(row: str, feature: str, tmp_path: Path):
    hole = HOLES.get((row, feature))
    if hole is None:
        SHOWN[feature](ROWS[row], tmp_path)
    else:
        refused(feature, ROWS[row], tmp_path, hole.error)


def refused(feature: str, row: Row, folder: Path, error: str) -> None:
    """Check that a hole is refused with its reason; a hole that works fails the test."""
    if feature == "to PEFT":
        lp.save_adapter(trained(row), folder)
        config = read_files(folder).config
        assert config["peft_type"] == "LIGHTNING_PEFT"
        assert error in config["reason"]
        with pytest.raises((KeyError, ValueError), match="LIGHTNING_PEFT"):
            read_by_peft(base(row), folder)
    elif feature == "from PEFT":
        kind, options = row.theirs
        with pytest.raises((AttributeError, TypeError), match=error):
            getattr(peft, kind)(**options)
        if not hasattr(peft, kind):
            name = kind.removesuffix("Config").upper()
            write_files(folder, {"peft_type": name, "target_modules": ["q_proj"]}, {"a": torch.ones(1)}, {}, None)
            with pytest.raises(lp.FormatError, match=f"peft_type '{name}' is not supported; supported are"):
                lp.load_adapter(base(row), folder)
    else:
        kinds: Any = {"merge": lp.MergeError, "unmerge": lp.MergeError, "rows": lp.RowError, "combine": ValueError}
        with pytest.raises(kinds[feature], match=error):
            SHOWN[feature](row, folder)


def test_every_method_has_a_row():
    abstract = {lp.PEFTMethod, lp.WeightMethod, lp.ActivationMethod, lp.SelectionMethod}
    exported = (getattr(lp, name) for name in lp.__all__)
    methods = {m for m in exported if inspect.isclass(m) and issubclass(m, lp.PEFTMethod)} - abstract
    assert {row.method for row in ROWS.values()} == methods


def test_holes_are_cells():
    assert {(row, feature) for row in ROWS for feature in FEATURES} >= HOLES.keys()
