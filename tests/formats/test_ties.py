"""Tied weights and shared modules: what trains, what the report says, and how PEFT handles them."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files, write_files
from tests.formats.models import adapted, gpt2, llama, logits, made_by_peft, read_by_peft, tokens
from tests.models import TiedLM


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


TIED = {
    "llama": (tied_llama, "q_proj", "model.embed_tokens", "lm_head"),
    "gpt2": (gpt2, "c_attn", "transformer.wte", "lm_head"),
    "own": (TiedLM, "fc1", "embed", "lm_head"),
}


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def ids(base: nn.Module) -> Tensor:
    return tokens() % (11 if isinstance(base, TiedLM) else 64)


@pytest.mark.parametrize("end", ["embedding", "head"])
@pytest.mark.parametrize("case", TIED)
def test_a_tied_weight_trains_under_all_of_its_names_here_and_in_peft(case: str, end: str, tmp_path):
    make, target, embedding, head = TIED[case]
    base = make()
    x, named, other = ids(base), *((embedding, head) if end == "embedding" else (head, embedding))
    method = lp.LoRA(r=2, targets=[target], trainable=[named])
    said = f"{other} trains as well: it holds the same tensor"
    assert any(said in note for note in lp.inspect(base, method).notes)
    ours = adapted(base, method)
    assert ours.get_submodule(named).weight is ours.get_submodule(other).weight
    lp.save_adapter(ours, tmp_path)
    assert_same(logits(read_by_peft(base, tmp_path), x), logits(ours, x))
    lp.load_adapter(again := copy.deepcopy(base), tmp_path, trainable=True)
    assert_same(logits(again, x), logits(ours, x))
    assert (
        again.get_submodule(named).adapters["default"].weight is again.get_submodule(other).adapters["default"].weight
    )
    lp.save_adapter(again, tmp_path / "again")
    assert_same(logits(read_by_peft(base, tmp_path / "again"), x), logits(ours, x))


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_loading_a_peft_file_unties_copied_heads_as_peft_does(options, tmp_path):
    base, x = tied_llama(), tokens()
    theirs = made_by_peft(
        base, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}), tmp_path / "theirs"
    )
    lp.load_adapter(ours := copy.deepcopy(base), tmp_path / "theirs")
    assert_same(logits(ours, x), logits(theirs, x))
    lp.save_adapter(ours, tmp_path / "ours")
    assert_same(logits(read_by_peft(base, tmp_path / "ours"), x), logits(ours, x))
    lp.load_adapter(again := copy.deepcopy(base), tmp_path / "ours")
    assert_same(logits(again, x), logits(ours, x))


def test_files_of_earlier_releases_have_one_name_of_a_tied_value(tmp_path):
    base, x = tied_llama(), tokens()
    ours = adapted(base, lp.LoRA(r=2, targets=["q_proj"], trainable=["embed_tokens"]))
    lp.save_adapter(ours, tmp_path)
    files = read_files(tmp_path)
    facts = json.loads(files.metadata["lightning_peft"])
    assert facts.pop("all_names")
    files.tensors.pop("base_model.model.lm_head.weight")
    config = {**files.config, "modules_to_save": ["embed_tokens"]}
    write_files(tmp_path, config, files.tensors, {"lightning_peft": json.dumps(facts)}, None)
    lp.load_adapter(again := copy.deepcopy(base), tmp_path)
    assert_same(logits(again, x), logits(ours, x))


def test_an_adapter_of_a_tied_module_changes_only_that_one(tmp_path):
    base, x = tied_llama(), tokens()
    method = lp.LoRA(r=2, targets=["embed_tokens"])
    assert any("adapted alone: lm_head.weight holds the same" in note for note in lp.inspect(base, method).notes)
    ours = adapted(base, method)
    assert ours.lm_head(torch.ones(1, 32)).equal(base.lm_head(torch.ones(1, 32)))
    lp.save_adapter(ours, tmp_path)
    assert_same(logits(read_by_peft(base, tmp_path), x), logits(ours, x))


class Shared(nn.Module):
    """One layer under two names, and one block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.again = self.a
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.block_again = self.block
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block_again(self.block(self.again(torch.relu(self.a(x))))))


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"targets": ["a"]}, True), ({"targets": ["out"], "trainable": ["a"]}, True), ({"targets": ["block.0"]}, False)],
)
def test_a_module_with_two_names_is_adapted_under_both(options, kept, tmp_path):
    base, x = Shared().eval(), torch.ones(1, 8)
    said = "a is the same module as again: its changes apply under each name"
    assert (said in lp.inspect(base, lp.LoRA(r=2, **options)).notes) is kept
    ours = adapted(base, lp.LoRA(r=2, **options))
    lp.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"] == "LIGHTNING_PEFT") is kept
    assert kept is ("'a' and ['again'] are the same module" in config.get("reason", ""))
    lp.load_adapter(again := copy.deepcopy(base), tmp_path)
    assert_same(logits(again, x), logits(ours, x))
    if not kept:
        assert_same(logits(read_by_peft(base, tmp_path), x), logits(ours, x))


def test_peft_files_of_a_module_with_two_names_are_refused(tmp_path):
    base = Shared()
    for options in ({"target_modules": ["a"]}, {"target_modules": ["out"], "modules_to_save": ["a"]}):
        made_by_peft(base, peft.LoraConfig(r=2, **options), tmp_path)
        with pytest.raises(
            lp.FormatError, match=r"'a' and \['again'\] are the same module: PEFT adapts it under the first"
        ):
            lp.load_adapter(copy.deepcopy(base), tmp_path)
