"""Test which weights of a model can be adapted, and which of them ``all-linear`` includes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.targeting.sites import find_sites, output_head, weight_sites
from tests.kinds import KINDS, MLP, FusedQKV, TiedLM


@pytest.mark.parametrize("kind", KINDS)
def test_sites_read_as_the_matrices_of_the_layers(kind: str):
    sites, _ = find_sites(KINDS[kind].build(), KINDS[kind].targets)
    assert {name: tuple(site.shape) for name, site in sites.items()} == KINDS[kind].matrices


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_goes_back_into_storage(kind: str):
    for site in weight_sites(KINDS[kind].build()).values():
        assert torch.equal(site.layout.stored(site.layout.matrix(site.weight), site.weight), site.weight)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (MLP, "head"),
        (FusedQKV, "head"),
        (TiedLM, "lm_head"),
        (KINDS["llama"].build, "model.lm_head"),
        (KINDS["mha"].build, None),
        (KINDS["encoder"].build, None),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "2"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), None),
        (lambda: nn.ModuleList(nn.ModuleDict({"out": nn.Linear(2, 2)}) for _ in range(3)), None),
        (lambda: nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}), None),
    ],
)
def test_output_head(model, head: str | None):
    assert output_head(model()) == head


def test_the_head_that_all_linear_leaves_is_noted():
    report = lp.inspect(MLP(), lp.LoRA(r=2))
    assert "head" not in report.modules
    assert report.notes == ["head (the output head) stays frozen; name it in targets or trainable to train it"]
    assert not lp.inspect(MLP(), lp.LoRA(r=2, trainable="head")).notes
    assert "head" in lp.inspect(MLP(), lp.LoRA(r=2, targets=["all-linear", "head"])).modules


def test_modules_trained_in_full_are_not_adapted():
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, targets="type:Linear", trainable="head"))
    assert not [k for k in model.state_dict() if k.startswith("head.adapters")]
    assert model.head.weight.requires_grad


def test_trainable_selects_the_module_and_not_others_of_the_same_name():
    model = nn.ModuleDict(
        {"fc": nn.Linear(2, 2), "body": nn.ModuleDict({"fc": nn.Linear(2, 2), "out": nn.Linear(2, 2)})}
    )
    sites, _ = find_sites(model, "type:Linear", trainable=["fc"])
    assert list(sites) == ["body.fc", "body.out"]


def test_exclude_takes_a_layer_or_all_within_a_module():
    model = KINDS["llama"].build()
    sites, _ = find_sites(model, "all-linear", exclude=["mlp", "layers.0", "k_proj"])
    kept = {f"model.model.layers.{i}.self_attn.{p}_proj" for i in (1, 2) for p in "qvo"}
    assert set(sites) == kept


def test_bare_parameters_are_adapted_only_when_named():
    model = KINDS["experts"].build()
    sites, _ = find_sites(model, "all-linear")
    assert set(sites) == {f"blocks.{i}.router" for i in range(3)}
    for pattern, count in {"up_proj": 3, "blocks.0.up_proj": 1, "re:.*\\.table": 3, "*.down_proj": 3}.items():
        assert len(find_sites(model, pattern)[0]) == count
    assert set(find_sites(model, "re:.*")[0]) == {f"blocks.{i}.router" for i in range(3)}


def test_a_bare_parameter_is_named_by_its_whole_name():
    model = nn.ModuleDict({"encoder": nn.Module(), "decode": nn.Linear(2, 2)})
    model.encoder.e = nn.Parameter(torch.zeros(2, 2))
    assert list(find_sites(model, "re:(en|de)cod.*")[0]) == ["decode"]
    assert list(find_sites(model, "re:encoder.e")[0]) == ["encoder.e"]


@pytest.mark.parametrize("name", ["weights", "run", "modifies_weight", "parameters_", "weight"])
def test_a_bare_parameter_may_have_any_name(name: str):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(4, 3)))

        def forward(self, x):
            return x @ getattr(self, name)

    model = nn.Sequential(Table())
    lp.apply(model, lp.LoRA(r=2, targets=[f"0.{name}"]))
    for parameter in lp.trainable_parameters(model):
        nn.init.ones_(parameter)
    x = torch.randn(2, 4)
    base = x @ getattr(model[0], name)
    output = model(x)
    assert not torch.allclose(output, base)
    lp.merge(model)
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(3, 3, max_norm=1.0), ".Embedding., which has max_norm and rescales its own weight"),
        (nn.LayerNorm(3), "'it' .LayerNorm., which has no weight to adapt; a weight method adapts Linear"),
        (nn.EmbeddingBag(3, 3), "only its parameters can be adapted: it.weight"),
        (nn.ReLU(), "has no weight to adapt"),
        (nn.Sequential(nn.Linear(3, 3)), "contains layers but is not one; nearest: 'it.\\*'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_adapted_is_refused_by_name(module: nn.Module, message: str):
    model = nn.ModuleDict({"it": module, "other": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    with pytest.raises(TargetError, match=message):
        lp.apply(model, lp.LoRA(r=1, targets="it"))


def test_all_linear_on_a_model_without_linear_layers_says_what_there_is():
    with pytest.raises(TargetError, match=r"no linear layer.*\['Conv2d'\].*targets='type:Conv2d'"):
        lp.apply(KINDS["conv2d"].build(), lp.LoRA(r=2))


def test_the_projection_that_attention_reads_is_one_site():
    sites = weight_sites(KINDS["mha"].build())
    assert [name for name in sites if name.startswith("layers.0")] == ["layers.0.in_proj_weight", "layers.0.out_proj"]
    assert sites["layers.0.out_proj"].host == "layers.0"
    only = find_sites(KINDS["mha"].build(), "out_proj")[0]
    assert list(only) == [f"layers.{i}.out_proj" for i in range(3)]


def test_subclasses_with_a_forward_of_their_own_have_no_activation_path():
    sites = weight_sites(KINDS["scaled"].build())
    assert {name: site.layout.has_activation for name, site in sites.items()} == {
        "embed": False,
        "fc1": False,
        "fc2": False,
        "head": True,
    }
