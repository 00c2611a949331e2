"""Parameters that are adapted by name, as they are stored, and read by layers or containers that are not linear."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts
from tests.helpers import close, perturb

IDS, OFFSETS = torch.tensor([1, 3, 3, 0, 5]), torch.tensor([0, 2])


class Lists(nn.Module):
    """Reads a ``ParameterList`` and a ``ParameterDict``."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"a": torch.randn(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = torch.tanh(x @ item)
        return x @ self.named["a"]


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[], tuple]]] = {
    **{
        f"bag {mode}": (lambda mode=mode: nn.EmbeddingBag(6, 4, mode=mode), ["weight"], lambda: (IDS, OFFSETS))
        for mode in ("sum", "mean", "max")
    },
    "bag of weighted entries": (
        lambda: nn.EmbeddingBag(6, 4, mode="sum", padding_idx=0),
        ["weight"],
        lambda: (IDS, OFFSETS, torch.linspace(-1, 1, 5, dtype=torch.float64)),
    ),
    "bilinear": (
        lambda: nn.Bilinear(4, 5, 3),
        ["weight"],
        lambda: (torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)),
    ),
    "lists": (Lists, ["items.0", "items.1", "named.a"], lambda: (torch.randn(2, 4, dtype=torch.float64),)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_is_adapted_where_it_is_read(case: str):
    make, names, inputs = CASES[case]
    model = nn.ModuleDict({"it": make()}).double()
    plain = copy.deepcopy(model["it"]).requires_grad_(False)
    lp.apply(model, lp.LoRA(r=2, alpha=4, targets=[f"it.{name}" for name in names], adapter_dtype="float64"))
    perturb(model, scale=0.5)
    weights, trained = {}, []
    for host, module in hosts(model):
        for parameter, adapter in module.adapters["default"].weights().items():
            name = ".".join([*host.split(".")[1:], parameter])
            weights[name] = plain.get_parameter(name) + 2 * adapter.lora_B @ adapter.lora_A
            trained += [adapter.lora_A, adapter.lora_B]
    assert weights.keys() == set(names)
    batch = inputs()
    outputs = model["it"](*batch), functional_call(plain, weights, batch)
    close(*outputs, 1e-11)
    for mine, other in zip(*(torch.autograd.grad(y.pow(2).sum(), trained) for y in outputs)):
        close(mine, other, 1e-10)
    lp.merge(model)
    close(model["it"](*batch), outputs[1], 1e-11)


def test_bitfit_trains_the_bias_of_a_bilinear_layer() -> None:
    model = nn.ModuleDict({"it": nn.Bilinear(4, 5, 3)}).double()
    lp.apply(model, lp.BitFit())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["it.bias"]
    batch, bias = CASES["bilinear"][2](), model["it"].bias

    def loss(value: Tensor) -> Tensor:
        return functional_call(model["it"], {"bias": value}, batch).pow(2).sum()

    loss(bias).backward()
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack([(loss(bias + d) - loss(bias - d)) / 2e-6 for d in step])
    close(bias.grad, differences, 1e-6)


def test_bitfit_refuses_an_embedding_bag() -> None:
    model = nn.ModuleDict({"it": nn.EmbeddingBag(6, 4)})
    with pytest.raises(lp.TargetError, match="finds no bias in ModuleDict, because its layers have none"):
        lp.apply(model, lp.BitFit())
    assert model["it"].weight.requires_grad


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_lora_names_what_it_can_adapt_of_an_embedding_bag(max_norm: float | None) -> None:
    model = nn.ModuleDict({"it": nn.EmbeddingBag(6, 4, max_norm=max_norm)})
    why = "only its parameters can be adapted: it.weight" if max_norm is None else "has max_norm and rescales"
    with pytest.raises(lp.TargetError, match=why):
        lp.apply(model, lp.LoRA(r=2, targets="it"))
