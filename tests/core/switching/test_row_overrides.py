"""Test mixed batches with adapters that override base parameters: heads, biases, norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.adapters.low_rank import LowRankAdapter
from lightning_peft.core.injection.attach import attach
from lightning_peft.core.targeting.sites import Site, weight_sites
from tests.core.switching.test_rows import one_by_one
from tests.formats.models import adapted, bert, tokens
from tests.helpers import adapter_parameters, close, differ, perturb
from tests.kinds import KINDS, Kind

HEAD = ["classifier"]
#: the adapters that are mixed in one batch; all except the last have copies of base parameters
OWN: dict[str, Callable[[], lp.PEFTMethod]] = {
    "bitfit": lambda: lp.BitFit(),
    "norms": lambda: lp.NormTuning(trainable=HEAD),
    "probe": lambda: lp.LinearProbe(),
    "last": lambda: lp.LastLayers(n=1),
    "head": lambda: lp.LoRA(r=2, targets=["query"], trainable=HEAD),
    "biases": lambda: lp.LoRA(r=2, bias="all", trainable=HEAD),
    "lora": lambda: lp.LoRA(r=2),
}


def loaded(base: nn.Module, folder: Path, methods: dict[str, lp.PEFTMethod], **options: bool) -> nn.Module:
    """A copy of ``base`` with adapters that were trained separately, saved and loaded."""
    model = copy.deepcopy(base)
    for name, method in methods.items():
        lp.save_adapter(adapted(base, method), folder / name)
        lp.load_adapter(model, folder / name, name=name, **options)
    return model.eval()


@torch.no_grad()
def test_each_row_has_its_own_head_biases_and_norms(tmp_path):
    model, x = loaded(bert(), tmp_path, {name: make() for name, make in OWN.items()}), torch.randint(0, 64, (10, 7))
    names = [*OWN, None, ("lora", "probe"), ("biases", "bitfit")]
    want = torch.cat(one_by_one(model, names, lambda i: model(x[i : i + 1]).logits))
    with lp.rows(model, names):
        close(model(x).logits, want)
    for i in (0, 1, 2, 3, 4, 5, 6):
        differ(want[i], want[7])
    lp.set_active(model, "probe")
    want = model(x).logits
    with lp.rows(model, ["probe"] * 10):  # all rows use the same copy
        close(model(x).logits, want)


def test_gradients_reach_the_copies_of_each_row(tmp_path):
    methods = {name: OWN[name]() for name in ("bitfit", "head", "biases")}
    model, x = loaded(bert(), tmp_path, methods, trainable=True).double(), torch.randint(0, 64, (5, 7))
    names = ["head", "bitfit", None, "biases", "head"]
    sum(y.square().sum() for y in one_by_one(model, names, lambda i: model(x[i : i + 1]).logits)).backward()
    want = {k: p.grad.clone() for k, p in adapter_parameters(model).items() if p.grad is not None}
    assert any("classifier.adapters.head" in key for key in want)
    model.zero_grad()
    with lp.rows(model, names):
        model(x).logits.square().sum().backward()
    got = {k: p.grad for k, p in adapter_parameters(model).items() if p.grad is not None}
    assert got.keys() == want.keys()
    for key in want:
        close(got[key], want[key])


@pytest.mark.parametrize("kind", ["linear", "conv2d", "resnet", "embedding", "mha", "mha_batch_first", "encoder"])
@torch.no_grad()
def test_every_layer_kind_that_is_called(kind, tmp_path):
    given: Kind = KINDS[kind]
    model, inputs = loaded(given.build(), tmp_path, {n: lp.FullFineTuning() for n in "ab"}), given.batch()
    dim = 1 if kind == "mha" else 0
    names = ["b", None, "a", "b"][: inputs[0].shape[dim]]
    if kind == "embedding":  # it looks positions up once for all rows
        with pytest.raises(lp.RowError, match="a table that all rows share"), lp.rows(model, names):
            model(*inputs)
        return
    want = one_by_one(model, names, lambda i: model(*(x.narrow(dim, i, 1) for x in inputs)))
    with lp.rows(model, names):
        close(model(*inputs), torch.cat(want, dim))


@torch.no_grad()
def test_heads_of_different_widths(tmp_path):
    wide = bert()
    wide.classifier, wide.num_labels = nn.Linear(16, 5), 5
    for base, name in ((bert(), "three"), (wide, "five"), (wide, "other")):
        lp.save_adapter(adapted(base, lp.LoRA(r=2, targets=["query"], trainable=HEAD)), tmp_path / name)
    model, x = bert(), tokens()
    for name in ("three", "five", "other"):
        lp.load_adapter(model, tmp_path / name, name=name, check_base=False)
    with lp.rows(
        model, ["five", "other"]
    ):  # heads of the same width work, even if the base's head has a different width
        assert model(x).logits.shape == (2, 5)
    for names in (["five", "three"], ["five", None]):
        with (
            pytest.raises(lp.RowError, match=r"'classifier' \(Linear\) returns .*5\).*3\).*heads of different widths"),
            lp.rows(model, names),
        ):
            model(x)


class Doubled(LowRankAdapter):
    """Overrides ``output`` to add twice its product."""

    scale, dropout = 1.0, 0.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.sides = site.shape

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1, self.sides[1]), torch.ones(self.sides[0], 1)

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + 2 * (super().output(host, x, y) - y)


@torch.no_grad()
def test_a_low_rank_adapter_with_an_output_of_its_own():
    site = next(iter(weight_sites(model := KINDS["linear"].build()).values()))
    attach(model, site.host, "twice", Doubled(site))
    x = KINDS["linear"].batch()[0]
    names = ["twice", *[None] * (len(x) - 1)]
    want = torch.cat(one_by_one(model, names, lambda i: model(x[i : i + 1])))
    with lp.rows(model, names):
        close(model(x), want)


@torch.no_grad()
def test_a_gate_and_a_bias_of_lora_take_part():
    """Low-rank adapters that also have a gate or a bias are not served by their product alone."""
    model, x = KINDS["linear"].build().eval(), KINDS["linear"].batch()[0]
    lp.apply(model, lp.GatedLoRA(r=2, name="gated"), lp.LoRA(r=2, lora_bias=True, name="bias"), lp.LoRA(name="plain"))
    perturb(model, scale=0.5)
    names = ["gated", "bias", "plain", None][: len(x)]
    want = torch.cat(one_by_one(model, names, lambda i: model(x[i : i + 1])))
    with lp.rows(model, names):
        close(model(x), want)
