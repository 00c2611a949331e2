"""Prefixes of models with sliding windows, on inputs longer than the window: PEFT's logits, whole and step by step."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files
from tests.formats.models import adapted, close, made_by_peft, moved, read_by_peft

#: two layers; Gemma's second and Qwen2's first have full attention
MODELS: dict[str, dict] = {
    "Mistral": {},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}
WINDOW, LENGTH = 6, 12


def build(name: str, **options) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, **heads, **MODELS[name], **options}, sliding_window=WINDOW
    )
    return moved(getattr(transformers, f"{name}ForCausalLM")(config))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **more) -> Tensor:
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(
    ("name", "attention"), [("Mistral", "sdpa"), ("Mistral", "eager"), ("Gemma2", "eager"), ("Qwen2", "sdpa")]
)
def test_prefixes_fall_out_of_the_window(name, attention, tmp_path):
    base, ids = build(name, attn_implementation=attention), torch.randint(3, 64, (2, LENGTH))
    theirs = made_by_peft(base, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tmp_path / "a")
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "a")
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    for length in (4, 5, LENGTH):
        close(logits(here, ids[:, :length]), logits(theirs, ids[:, :length]))
    got, expected = logits(here, ids, attention_mask=mask), logits(theirs, ids, attention_mask=mask)
    close(got[mask.bool()], expected[mask.bool()])

    ours = adapted(base, lp.PrefixTuning(4, shift_positions=True, init_std=0.5))
    lp.save_adapter(ours, tmp_path / "b")
    assert read_files(tmp_path / "b").config["peft_type"] == "PREFIX_TUNING"
    close(logits(read_by_peft(base, tmp_path / "b"), ids), logits(ours, ids))


@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_equal_the_uncached_forward(name):
    model, ids = (
        adapted(build(name), lp.PrefixTuning(3, shift_positions=True, init_std=0.5)),
        torch.randint(3, 64, (2, 12)),
    )
    whole = logits(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids[:, :4], use_cache=True)
        steps = [out.logits]
        for i in range(4, LENGTH):
            cache = getattr(out, "cache", None) or out.past_key_values
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    close(torch.cat(steps, 1), whole)


def test_rows_have_windows_of_their_own():
    model = adapted(
        build("Mistral"),
        lp.PrefixTuning(3, shift_positions=True, init_std=0.5, name="a"),
        lp.PrefixTuning(5, init_std=0.5, name="b"),
    )
    ids, expected = torch.randint(3, 64, (3, LENGTH)), []
    for name in ("a", "b", None):
        with lp.active(model, name) if name else lp.disabled(model):
            expected.append(logits(model, ids))
    with lp.rows(model, ["a", "b", None]):
        got = logits(model, ids)
    close(got, torch.stack([one[i] for i, one in enumerate(expected)]))


def test_without_shifted_positions_every_token_sees_the_prefix():
    """The last logits still depend on the prefix if every layer has a window."""
    model, ids = (
        adapted(build("Mistral", num_hidden_layers=1), lp.PrefixTuning(3, init_std=0.5)),
        torch.randint(3, 64, (1, 12)),
    )
    shifted = adapted(build("Mistral", num_hidden_layers=1), lp.PrefixTuning(3, shift_positions=True, init_std=0.5))
    for one, depends in ((model, True), (shifted, False)):
        before = logits(one, ids)[:, -1]
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "prefix" in name:
                    parameter.add_(1.0)
        assert (not torch.allclose(logits(one, ids)[:, -1], before, atol=1e-4)) is depends
