"""Linear layers that do not derive from ``nn.Linear``: which layers a trial call must and must not recognise."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lightning_peft as lp
from lightning_peft.core.targeting import linear_like
from lightning_peft.core.targeting.linear_like import linear_form
from tests.helpers import close, perturb
from tests.models import Product, Projection


class Own(nn.Module):
    """A matrix and a bias; a subclass computes with them."""

    def __init__(self, inputs: int = 4, outputs: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Counting(Own):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return super().forward(x)


class Optional(Own):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Scaled(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class NoBias(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Clipped(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class Noisy(Own):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class Normalised(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Activated(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Cosine(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


class Masked(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Two(Own):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (Own(), "linear"),
        (Own(5, 3, bias=False), "linear"),
        (Counting(), "linear"),
        (Optional(), "linear"),
        (Projection(4, 4), "linear"),
        (Product(4, 4), "transposed"),
        (Product(5, 3, bias=False), "transposed"),
        *[(kind(), None) for kind in (Scaled, NoBias, Clipped, Noisy, Normalised, Activated, Cosine, Masked, Two)],
        (nn.EmbeddingBag(4, 4), None),
        (nn.Bilinear(4, 4, 4), None),
        (nn.LayerNorm(4), None),
        (nn.utils.parametrizations.weight_norm(Own()), "linear"),
        (nn.utils.spectral_norm(Own(3, 5)), "linear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_layer_is_linear_if_a_trial_call_computes_the_same(layer: nn.Module, form: str | None):
    before, state = torch.get_rng_state(), copy.deepcopy(vars(layer))
    assert linear_form(layer) == linear_form(layer) == form
    assert torch.equal(torch.get_rng_state(), before)
    assert getattr(layer, "seen", []) == state.get("seen", [])
    assert layer.training


def test_all_linear_adapts_the_ones_it_recognises_and_says_what_it_leaves_out():
    model = nn.ModuleDict({"a": Own(), "b": Normalised(), "c": nn.Linear(4, 4)})
    report = lp.inspect(model, lp.LoRA(r=2, trainable=["c"]))
    assert list(report.modules) == ["a", "c"]
    assert "all-linear leaves out b (Normalised): a trial call did not compute" in str(report.notes)
    hint = next(note for note in report.notes if "Normalised" in note).split("Name '")[1].split("'")[0]
    assert lp.inspect(model, lp.LoRA(r=2, targets=[hint])).modules
    # its name in earlier releases
    assert list(lp.inspect(model, lp.LoRA(r=2, targets=["a.weight"])).modules) == ["a"]


def test_a_registered_layer_is_adapted_in_its_own_forward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_like, "_REGISTERED", {})
    model = nn.ModuleDict({"a": Product(4, 3), "b": Own()})
    assert "lp.register_linear(Product, transposed=True)" in str(lp.inspect(model, lp.LoRA(r=2)).notes)
    assert lp.register_linear(Normalised) is Normalised
    model = nn.ModuleDict({"a": Normalised(4, 3), "b": Own()}).double()
    plain = copy.deepcopy(model["a"])
    lp.apply(model, lp.LoRA(r=2, alpha=4, targets=["type:Normalised"], adapter_dtype="float64"))
    adapter = perturb(model)["a"].adapters["default"]
    x = torch.randn(2, 4, dtype=torch.float64)
    weight = plain.weight + 2 * adapter.lora_B @ adapter.lora_A
    close(model["a"](x), functional_call(plain, {"weight": weight}, (x,)), 1e-12)
    lp.merge(model)
    close(model["a"](x), functional_call(plain, {"weight": weight}, (x,)), 1e-12)
    with pytest.raises(TypeError, match="takes a subclass"):
        lp.register_linear(F.linear)


def test_a_hint_names_only_what_can_be_adapted():
    model = nn.ModuleDict({"a": nn.Conv1d(2, 2, 1).to(torch.float8_e4m3fn), "b": nn.Conv1d(2, 2, 1)})
    with pytest.raises(lp.TargetError, match="targets='b'"):
        lp.inspect(model, lp.LoRA(r=2))
    with pytest.raises(lp.TargetError) as error:
        lp.inspect(nn.ModuleDict({"a": model["a"]}), lp.LoRA(r=2))
    assert "for example" not in str(error.value)


class Typed(nn.Module):
    """A matrix for each type, as PyTorch Geometric's HeteroLinear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 6))
        self.positions = nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return torch.einsum("bi,bio->bo", x, self.weight[kinds])


def test_all_linear_names_stacked_matrices_and_how_to_adapt_them():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "typed": Typed(), "head": nn.Linear(4, 4)})
    (note,) = [note for note in lp.inspect(model, lp.LoRA(r=2, trainable=["head"])).notes if "leaves out" in note]
    assert note.startswith("all-linear leaves out typed.weight (Typed): it holds one matrix per expert or type")
    hint = note.split("for example '")[1].rstrip("'")
    assert list(lp.inspect(model, lp.LoRA(r=2, targets=[hint])).modules) == ["typed.weight"]


@pytest.mark.parametrize(
    ("targets", "found"),
    [("type:Sequential", ["body.0", "body.1"]), ("body", ["body.0", "body.1"]), ("re:bod.", ["body.0", "body.1"])],
)
def test_a_suggested_pattern_is_accepted(targets: str, found: list[str]):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "typed": Typed()})
    with pytest.raises(lp.TargetError) as error:
        lp.inspect(model, lp.LoRA(r=1, targets=targets))
    hint = str(error.value).split("nearest: '")[1].rstrip("'")
    assert list(lp.inspect(model, lp.LoRA(r=1, targets=hint)).modules) == found


def test_a_type_that_holds_bare_parameters_is_not_suggested():
    with pytest.raises(lp.TargetError) as error:
        lp.inspect(nn.ModuleDict({"typed": Typed()}), lp.LoRA(r=1, targets="type:Type"))
    assert "nearest: type:Typed" not in str(error.value)
