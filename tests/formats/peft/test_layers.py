"""Random configurations of layer-wise methods are exchanged with PEFT both ways, and the logits agree."""

from __future__ import annotations

import copy
import random
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.files import read_files, write_files
from lightning_peft.formats.load import load_adapter
from lightning_peft.formats.peft.converter import NotInPeftError
from lightning_peft.formats.save import save_adapter
from tests.formats import models
from tests.formats.models import adapted, close, logits, made_by_peft, moved, read_by_peft, tokens


class Pixels(nn.Module):
    """Convolutions in one, two and three dimensions that PEFT adapts correctly, an embedding and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 12)
        self.line = nn.Conv1d(12, 8, 3, padding=1, stride=2)
        self.image = nn.Conv2d(1, 6, (3, 2), padding="same")
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, dilation=(1, 2), padding=2, bias=False)
        self.pixel = nn.Conv2d(4, 6, 1)
        self.volume = nn.Conv3d(1, 6, 2)
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.line(self.emb(x).transpose(1, 2))
        h = self.pixel(self.grouped(self.image(h[:, None]).relu()))
        h = self.volume(h[:, None]).flatten(2).mean(1)
        return self.head(h[:, :24])


LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "classifier"],
}
CONV1D = {"gpt2": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
FACTORS = {**LINEAR, "Pixels": ["line", "image", "grouped", "pixel", "head"]}
#: method -> the layers it may adapt, by model
LAYERS = {
    "VeRA": {**LINEAR, **CONV1D},
    "LoHa": FACTORS,
    "LoKr": FACTORS,
    "OFT": {**LINEAR, "Pixels": ["emb", "pixel", "head"]},
    "IA3": {**LINEAR, **CONV1D, "Pixels": ["image", "grouped", "pixel", "volume", "head"]},
}
CONFIGS = {"VeRA": peft.VeraConfig, "LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig, "OFT": peft.OFTConfig,
           "IA3": peft.IA3Config}  # fmt: skip
CASES = [(method, seed) for method in LAYERS for seed in range(12)]


def build(name: str) -> nn.Module:
    """Build a model with weights so large that every layer affects the logits."""
    return moved(Pixels() if name == "Pixels" else getattr(models, name)())


def draw(method: str, seed: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A model's name, our arguments, and PEFT's equivalent arguments."""
    rng = random.Random(f"{method}{seed}")
    model = list(LAYERS[method])[seed % len(LAYERS[method])]
    layers = LAYERS[method][model]
    targets = sorted(rng.sample(layers, rng.randint(1, min(4, len(layers)))))
    some = rng.sample(targets, rng.randint(0, len(targets)))
    ours: dict[str, Any] = {"targets": targets}
    theirs: dict[str, Any] = {"target_modules": targets}
    if method == "VeRA":
        ours |= {"r": rng.choice([3, 8]), "d_initial": 0.2, "save_projection": rng.random() < 0.5}
        theirs |= ours | {"projection_prng_key": 5}
        ours["projection_seed"] = 5
        del theirs["targets"]
    elif method in ("LoHa", "LoKr"):
        both = {
            "r": rng.choice([1, 2, 3]),
            "alpha": rng.choice([1, 5, 16]),
            "rank_pattern": {target: rng.choice([1, 4]) for target in some},
            "alpha_pattern": {target: rng.choice([3, 8.5]) for target in some},
            "use_effective_conv2d": rng.random() < 0.5,
        }
        if method == "LoKr":
            both["rank_pattern"] |= {"line": 1} if "line" in targets else {}
            both |= {"decompose_both": rng.random() < 0.5, "decompose_factor": rng.choice([-1, 2, 4, 5])}
        ours |= both
        theirs |= both
    elif method == "OFT":
        both = {
            "block_share": rng.random() < 0.3,
            "use_cayley_neumann": rng.random() < 0.5,
            "num_cayley_neumann_terms": rng.choice([2, 4, 5, 7]),
        }
        size = rng.choice([{"block_size": 4}, {"block_size": 5}, {"r": 3}])
        ours |= both | size
        theirs |= both | {"oft_block_size": size.get("block_size", 0), "r": size.get("r", 0)}
    else:
        feedforward = [t for t in targets if rng.random() < 0.5]
        ours |= {"feedforward_targets": feedforward}
        theirs |= {"feedforward_modules": feedforward}
    return model, ours, theirs


@pytest.mark.parametrize(("method", "seed"), CASES)
def test_ours_in_peft_and_back(method, seed, tmp_path):
    model, options, _ = draw(method, seed)
    base, x = build(model), tokens()
    ours = adapted(base, getattr(lp, method)(**options))
    save_adapter(ours, tmp_path / "ours")
    close(logits(read_by_peft(base, tmp_path / "ours"), x), logits(ours, x))
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)

    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    close(logits(again, x), logits(ours, x))
    save_adapter(again, tmp_path / "again")
    first, second = read_files(tmp_path / "ours"), read_files(tmp_path / "again")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())
    assert first.config == second.config


@pytest.mark.parametrize(("method", "seed"), CASES)
def test_peft_file_loads_here_and_goes_back(method, seed, tmp_path):
    model, _, options = draw(method, seed)
    base, x = build(model), tokens()
    theirs = made_by_peft(base, CONFIGS[method](**options), tmp_path / "theirs")
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path / "theirs")
    close(logits(here, x), logits(theirs, x))
    assert not torch.allclose(logits(here, x), logits(base, x), atol=1e-3)
    save_adapter(here, tmp_path / "again")
    close(logits(read_by_peft(base, tmp_path / "again"), x), logits(theirs, x))


def test_projections_that_are_only_in_the_file(tmp_path):
    """The projections are only in the file."""
    base, x = build("llama"), tokens()
    theirs = made_by_peft(base, peft.VeraConfig(r=4, target_modules=["v_proj", "down_proj"]), tmp_path)
    files = read_files(tmp_path)
    changed = {k: v * 2 if k == "base_model.vera_A" else v for k, v in files.tensors.items()}
    write_files(tmp_path, files.config, changed, files.metadata, None)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path)
    close(logits(here, x), logits(read_by_peft(base, tmp_path), x))
    assert not torch.allclose(logits(here, x), logits(theirs, x), atol=1e-3)


@pytest.mark.parametrize("share", [False, True])
def test_constrained_rotations_are_projected(share, tmp_path):
    base, x = build("llama"), tokens()
    config = peft.OFTConfig(
        target_modules=["q_proj", "up_proj"], oft_block_size=4, coft=True, eps=0.5, block_share=share
    )
    made_by_peft(base, config, tmp_path)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path)
    theirs = logits(read_by_peft(base, tmp_path), x)
    close(logits(here, x), theirs)
    config = read_files(tmp_path).config
    free = {**config, "coft": False}
    files = read_files(tmp_path)
    write_files(tmp_path, free, files.tensors, files.metadata, None)
    assert not torch.allclose(logits(read_by_peft(base, tmp_path), x), theirs, atol=1e-4), "it is not cut at all"


def test_three_terms_are_four_in_peft(tmp_path):
    base, x = build("llama"), tokens()
    config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, num_cayley_neumann_terms=3)
    theirs = made_by_peft(base, config, tmp_path)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path)
    close(logits(here, x), logits(theirs, x))
    ours = adapted(base, lp.OFT(4, targets=["q_proj"], use_cayley_neumann=True, num_cayley_neumann_terms=3))
    with pytest.raises(NotInPeftError, match="computes num_cayley_neumann_terms=3 with four terms"):
        save_in_peft(ours, tmp_path / "ours")


def save_in_peft(model: nn.Module, directory: Any) -> None:
    from lightning_peft.formats.directory.snapshot import take_snapshot
    from lightning_peft.formats.registry import converter_for_method

    snapshot = take_snapshot(model, "default")
    converter = converter_for_method(snapshot.method)
    assert converter is not None
    converter.write(snapshot)


def test_full_lokr_factors_of_conv1d_differ_from_peft(tmp_path):
    base = build("Pixels")
    made_by_peft(base, peft.LoKrConfig(r=4, target_modules=["line"]), tmp_path)
    with pytest.raises(
        FormatError, match=r"does not compute the Kronecker product .*: set r below half of 4 at 'line'"
    ):
        load_adapter(copy.deepcopy(base), tmp_path)
    with pytest.raises(NotInPeftError, match="does not compute the Kronecker product"):
        save_in_peft(adapted(base, lp.LoKr(4, targets=["line"])), tmp_path)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (lp.LoHa(2, targets=["volume"]), r"LOHA does not adapt weights like 'volume' \(Conv3d\)"),
        (lp.LoKr(2, targets=["emb"]), r"LOKR does not adapt weights like 'emb' \(Embedding\)"),
        (lp.VeRA(4, targets=["pixel"]), r"VERA does not adapt weights like 'pixel' \(Conv2d\)"),
        (lp.IA3(targets=["line"], feedforward_targets=()), r"IA3 does not adapt weights like 'line' \(Conv1d\)"),
        (lp.OFT(2, targets=["image"]), "gives different outputs before and after merging"),
    ],
)
def test_layers_that_peft_does_not_adapt_with_this_method(method, reason, tmp_path):
    with pytest.raises(NotInPeftError, match=reason):
        save_in_peft(adapted(build("Pixels"), method), tmp_path)


def test_padding_that_peft_ignores(tmp_path):
    base = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(NotInPeftError, match="pads with zeros, but '0' has padding_mode='circular'"):
        save_in_peft(adapted(base, lp.LoHa(2, targets=["0"])), tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (peft.LoKrConfig(target_modules=["0"]), {"decompose_both": "yes"}, "decompose_both must be true or false"),
        (peft.LoKrConfig(target_modules=["0"]), {"weight_decompose": True}, "unknown option weight_decompose=True"),
        (peft.LoHaConfig(target_modules=["0"]), {"r": 2.5}, "r must be an integer of at least 1, got 2.5"),
        (peft.LoHaConfig(target_modules=["0"]), {"r": 5}, r"hada_w1_a' has shape 6x8, but this base needs 6x5"),
        (peft.LoHaConfig(target_modules=["0"]), {"r": 10**12}, "r=1000000000000, but no tensor in the file has a dim"),
        (
            peft.VeraConfig(target_modules=["0"], r=4),
            {"r": 10**12},
            "no tensor in the file has a dimension of that size",
        ),
        (peft.LoHaConfig(target_modules=["0"]), {"rank_pattern": {"0": 10**12}}, "no tensor in the file has a dim"),
        (peft.LoHaConfig(target_modules=["0"]), {"rank_pattern": [4]}, "rank_pattern must map patterns to numbers"),
        (
            peft.LoHaConfig(target_modules=["0"]),
            {"alpha_pattern": {"(": 4}},
            "alpha_pattern: '[(]' is not a valid regular",
        ),
        (
            peft.LoHaConfig(target_modules=["0"]),
            {"target_modules": "("},
            "target_modules: '[(]' is not a valid regular",
        ),
        (peft.LoHaConfig(target_modules=["0"]), {"target_modules": 1}, "target_modules must be a list of names, got 1"),
        (peft.LoHaConfig(target_modules=["0"]), {"modules_to_save": "0"}, "modules_to_save must be a list of names"),
        (
            peft.LoHaConfig(target_modules=["0"]),
            {"layers_to_transform": "0"},
            "must be a layer index or a list of them, got '0'",
        ),
        (peft.LoHaConfig(target_modules=["0"]), {"target_modules": ["1"]}, "target_modules: '1' matches nothing"),
        (peft.VeraConfig(target_modules=["0"], r=4), {"save_projection": False}, "does not mention: .*vera_A"),
        (peft.OFTConfig(target_modules=["0"], oft_block_size=4), {"num_cayley_neumann_terms": 1}, "at least 2"),
        (peft.OFTConfig(target_modules=["0"], oft_block_size=4), {"oft_block_size": None}, "PEFT before 0.14"),
        (
            peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
            {"feedforward_modules": 3},
            "feedforward_modules must be a list of names",
        ),
    ],
)
def test_files_that_cannot_be_read(config, change, reason, tmp_path):
    base = nn.Sequential(nn.Linear(8, 6))
    made_by_peft(base, config, tmp_path)
    files = read_files(tmp_path)
    write_files(tmp_path, {**files.config, **change}, files.tensors, files.metadata, None)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises((FormatError, ValueError), match=reason):
        load_adapter(base, tmp_path)
    assert base.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    "method",
    [
        lp.VeRA(4, targets=["query"], trainable=["classifier"]),
        lp.LoKr(2, targets=["query"], trainable=["classifier"]),
        lp.OFT(4, targets=["query", "word_embeddings"], trainable=["classifier"]),
        lp.IA3(trainable=["classifier"]),
    ],
    ids=lambda m: type(m).__name__,
)
def test_with_a_head_and_an_embedding(method, tmp_path):
    base, x = build("bert"), tokens()
    ours = adapted(base, method)
    save_adapter(ours, tmp_path / "ours")
    assert read_files(tmp_path / "ours").config["modules_to_save"] == ["classifier"]
    theirs = read_by_peft(base, tmp_path / "ours")
    close(logits(theirs, x), logits(ours, x))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / folder)
        close(logits(again, x), logits(ours, x))


def test_two_methods_on_one_model(tmp_path):
    base, x = build("llama"), tokens()
    expected = {}
    for name, method in {
        "vera": lp.VeRA(4, targets=["q_proj"], projection_seed=3),
        "ia3": lp.IA3(),
        "oft": lp.OFT(4),
    }.items():
        ours = adapted(base, method)
        expected[name] = logits(ours, x)
        save_adapter(ours, tmp_path / name)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path)
    for name, wanted in expected.items():
        with lp.active(here, name):
            close(logits(here, x), wanted)
