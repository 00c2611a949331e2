"""Adapters that PEFT cannot represent are saved in the same two files and load exactly."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.registry import _METHODS
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.files import read_files, write_files
from lightning_peft.formats.load import load_adapter
from lightning_peft.formats.save import save_adapter
from tests.formats import models
from tests.formats.models import Called, Wrapped, adapted, logits, moved, tokens


class Vision(nn.Module):
    """A patch transformer, as visual prompts need."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.emb(x)).mean(1)))


METHODS: dict[str, tuple[str, Any]] = {
    "SSF": ("bert", lambda: lp.SSF()),
    "DyLoRA": ("bert", lambda: lp.DyLoRA(4, targets=["query"])),
    "bottleneck": ("bert", lambda: lp.BottleneckAdapter(bottleneck_size=4)),
    "parallel": ("bert", lambda: lp.BottleneckAdapter("scaled_parallel", bottleneck_size=4)),
    "VPT": ("Vision", lambda: lp.VisualPromptTuning(3, targets=["encoder"])),
    "deep VPT": ("Vision", lambda: lp.VisualPromptTuning(3, targets=["encoder"], deep=True)),
    "BitFit": ("bert", lambda: lp.BitFit()),
    "BitFit and a head": ("bert", lambda: lp.BitFit(trainable=["classifier"])),
    "LastLayers": ("bert", lambda: lp.LastLayers()),
    "LinearProbe": ("bert", lambda: lp.LinearProbe()),
    "FullFineTuning": ("bert", lambda: lp.FullFineTuning()),
    "GradualUnfreezing": ("bert", lambda: lp.GradualUnfreezing()),
    "gated prefix": ("bert", lambda: lp.PrefixTuning(3, gate=True)),
    "prefix with its network": ("bert", lambda: lp.PrefixTuning(3, bottleneck_size=5)),
    "prompt by template": ("bert", lambda: lp.PromptTuning(template="v2 x1 v3 x*", trainable=["classifier"])),
    "p-tuning with its network": ("bert", lambda: lp.PTuning(3, position="after_bos", encoder="lstm")),
    "LoHa of 3 dimensions": ("Convolutions", lambda: lp.LoHa(2, targets=["conv3"])),
    "IA3 of attention": ("Attention", lambda: lp.IA3(targets=["out_proj"], feedforward_targets=())),
    "OFT of a convolution": ("Convolutions", lambda: lp.OFT(2, targets=["conv2", "grouped"])),
    "LoKr of bare parameters": ("Experts", lambda: lp.LoKr(2, targets=["layers.0.up", "layers.0.down"])),
}


def build(name: str) -> nn.Module:
    return moved((Vision if name == "Vision" else getattr(models, name))())


@pytest.mark.parametrize("case", list(METHODS))
def test_saving_and_loading_is_exact(case, tmp_path, monkeypatch):
    name, make = METHODS[case]
    base, x = build(name), tokens()
    ours = adapted(base, make())
    save_adapter(ours, tmp_path / "a")
    config = read_files(tmp_path / "a").config
    assert config["peft_type"] == "LIGHTNING_PEFT"
    assert "PEFT" in config["reason"]
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)

    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "a", name="other")
    assert torch.equal(logits(again, x), logits(ours, x))
    # So that both models run the same kernels: an adapted nn.MultiheadAttention does not take the fused path, and
    # torch.matmul takes another path for a weight that requires a gradient.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    base.requires_grad_(False)
    with lp.disabled(again):
        assert torch.equal(logits(again, x), logits(base, x))
    save_adapter(again, tmp_path / "b")
    first, second = read_files(tmp_path / "a").tensors, read_files(tmp_path / "b").tensors
    assert all(torch.equal(value, first[key]) for key, value in second.items())
    before = base.state_dict()
    for key in first.keys() - second.keys():  # the base's own value: this part was not unfrozen yet
        assert torch.equal(first[key], before[key.removeprefix("base_model.model.")])


@pytest.mark.parametrize("case", ["BitFit and a head", "bottleneck", "prompt by template", "FullFineTuning"])
def test_beside_another_adapter(case, tmp_path):
    name, make = METHODS[case]
    base, x = build(name), tokens()
    ours = adapted(base, make())
    save_adapter(ours, tmp_path)
    here = adapted(base, lp.LoRA(2, targets=["query"]))
    before = logits(here, x)
    load_adapter(here, tmp_path, name="other")
    assert torch.equal(logits(here, x), before), "it waits to be set active"
    with lp.active(here, "other"):
        torch.testing.assert_close(logits(here, x), logits(ours, x))


@pytest.mark.parametrize("patterns", [["net.bert.encoder.layer.0.intermediate.dense"], "re:net\\.bert.*query",
                                      ["query", "net.bert.encoder.layer.*.output.dense"]])  # fmt: skip
def test_patterns_lose_the_name_of_the_module_around_the_base(patterns, tmp_path):
    base, x = build("bert"), tokens()
    ours = adapted(Wrapped(copy.deepcopy(base)), lp.SSF(targets=patterns, trainable="net.classifier"))
    save_adapter(ours, tmp_path)
    assert "net" not in str(read_files(tmp_path).config["config"]["trainable"])
    for other in (copy.deepcopy(base), Called(copy.deepcopy(base)), Wrapped(copy.deepcopy(base))):
        load_adapter(other, tmp_path)
        assert torch.equal(logits(other, x), logits(ours, x))


class RowShift(lp.WeightMethod):
    def build(self, site):
        return RowShiftAdapter(site)


class RowShiftAdapter(lp.WeightAdapter):
    def __init__(self, site):
        super().__init__(site)
        self.rows = nn.Parameter(torch.zeros(site.shape[-2], 1))

    def delta(self, weight):
        return self.rows.expand_as(weight)


def test_a_user_defined_method(tmp_path):
    base, x = build("bert"), tokens()
    ours = adapted(base, RowShift(targets=["query", "value"]))
    save_adapter(ours, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, x), logits(ours, x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "RowSchift"}, "no method named 'RowSchift'; defined are .*; nearest: 'RowShift'"),
        ({"method": "hostile_method.Evil"}, "no method named 'hostile_method.Evil'"),
        ({"method": ["RowShift"]}, "method must be a class name"),
        ({"config": "targets"}, "config a dictionary of arguments"),
        ({"config": {"target": ["query"]}}, "RowShift does not accept the arguments in the file.*target"),
        ({"config": {"targets": ["querry"]}}, "'querry' matches nothing; nearest: .*query"),
        ({"config": {"targets": ["query"]}}, "the file has tensors for .*value.*which its options do not adapt"),
        ({"config": {"targets": ["query", "value", "key"]}}, "missing .*rows"),
    ],
)
def test_files_that_cannot_be_read(change, reason, tmp_path, monkeypatch):
    (tmp_path / "hostile_method.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    base = build("bert")
    save_adapter(adapted(base, RowShift(targets=["query", "value"])), tmp_path / "a")
    files = read_files(tmp_path / "a")
    write_files(tmp_path / "a", {**files.config, **change}, files.tensors, files.metadata, None)
    with pytest.raises(ValueError, match=reason) as error:
        load_adapter(base, tmp_path / "a")
    assert isinstance(error.value, FormatError | lp.TargetError)
    assert not any("adapters" in key for key in base.state_dict())
    assert "hostile_method" not in sys.modules
    assert not Path("ran").exists()


HUGE = {
    "bottleneck_size": (lp.BottleneckAdapter(bottleneck_size=4), 10**13),
    "num_virtual_tokens": (lp.PrefixTuning(3), 10**13),
}


@pytest.mark.parametrize("option", HUGE)
def test_a_declared_size_that_the_file_does_not_have_allocates_no_memory(option, tmp_path):
    method, size = HUGE[option]
    base = build("bert")
    save_adapter(adapted(base, method), tmp_path)
    files = read_files(tmp_path)
    assert option in files.config["config"]
    config = {**files.config, "config": {**files.config["config"], option: size}}
    write_files(tmp_path, config, files.tensors, files.metadata, None)
    with pytest.raises(FormatError, match=r"asks for a tensor of [\d,]+ values"):
        load_adapter(base, tmp_path)


def test_a_tokenizer_that_a_file_names_is_not_looked_up(tmp_path, monkeypatch):
    base, x = build("bert"), tokens()
    ours = adapted(base, lp.PromptTuning(3, position="after_bos"))
    save_adapter(ours, tmp_path)
    files = read_files(tmp_path)
    start = {"init": "text", "init_text": "Is it good?", "tokenizer": "somewhere/else"}
    config = {**files.config, "config": files.config["config"] | start}
    write_files(tmp_path, config, files.tensors, files.metadata, None)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, x), logits(ours, x))


def test_a_folded_network_stays_folded(tmp_path):
    base, x = build("bert"), tokens()
    ours = adapted(base, lp.PrefixTuning(3, bottleneck_size=5))
    lp.fold(ours)
    save_adapter(ours, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, x), logits(ours, x))
    assert any(key.endswith("prefix_keys") for key in again.state_dict())


def test_two_methods_with_the_same_class_name_are_told_apart(tmp_path):
    base = build("bert")
    save_adapter(adapted(base, RowShift(targets=["query"])), tmp_path)
    type("RowShift", (lp.LoRA,), {"__module__": "elsewhere"})
    try:
        with pytest.raises(lp.FormatError, match=r"elsewhere and .*test_native each define a method named 'RowShift'"):
            load_adapter(base, tmp_path)
    finally:
        del _METHODS["RowShift"]["elsewhere"]


def test_an_option_that_does_not_exist_is_an_error(tmp_path):
    lp.apply(model := nn.Sequential(nn.Linear(3, 3)), lp.SSF(targets=["0"]))
    with pytest.raises(TypeError, match="format"):
        lp.save_adapter(model, tmp_path, format="peft")
