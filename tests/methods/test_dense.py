"""LoRA against a dense reference: W + s B A written into the plain layer, in float64.

Outputs and the gradients of A, B and the input, for every option of a layer that Hugging Face PEFT gets wrong
(dilation, padding modes, groups: ``test_parity.py`` has the rest) and for those it gets right.
"""

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
from tests.models import ScaledEmbedding, ScaledLinear

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 8)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "stride": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3)), (2, 4, 7, 8)),
    "padding": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1)), (2, 4, 7, 8)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2), (2, 4, 7, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 9, 9)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
    "even same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 7, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=(0, 2), padding_mode="replicate", stride=2), (2, 4, 7, 8)),
    "circular same": (lambda: nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular"), (2, 4, 7, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 8)),
    "groups reflect dilation": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=2, dilation=2, padding_mode="reflect", stride=2),
        (2, 4, 9, 9),
    ),
    "non-square": (lambda: nn.Conv2d(4, 6, (1, 5), padding=(0, 2)), (2, 4, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2), (2, 4, 11)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular"), (2, 4, 11)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), groups=2, padding=1), (2, 4, 3, 4, 5)),
    "conv3d replicate": (lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate"), (2, 4, 3, 4, 3)),
}
TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 6)),
    "transposed stride": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1), (2, 4, 5, 6)),
    "transposed output padding": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, padding=2, output_padding=(2, 1), bias=False),
        (2, 4, 5, 6),
    ),
    "transposed dilation": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=(2, 3), output_padding=(1, 2)), (2, 4, 5, 6)),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 6)),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=4, padding=1), (2, 4, 5, 6)),
    "transposed unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 5, stride=3, groups=2, output_padding=1), (2, 4, 7)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, (1, 2, 3), stride=(1, 2, 1), groups=2), (2, 4, 3, 4, 3)),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Tensor]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear 1-D": (lambda: nn.Linear(6, 4), (6,)),
    "linear 4-D": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 2, 6)),
    "linear empty": (lambda: nn.Linear(6, 4), (0, 6)),
    "own forward": (lambda: ScaledLinear(6, 4), (3, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), torch.tensor([[1, 8, 1], [0, 3, 3]])),
    "embedding padding": (lambda: nn.Embedding(9, 5, padding_idx=3), torch.tensor([[1, 8, 1], [0, 3, 3]])),
    "embedding own forward": (lambda: ScaledEmbedding(9, 5), torch.tensor([[1, 8, 1], [0, 3, 3]])),
}


def _dense(plain: nn.Module, a: Tensor, b: Tensor, scale: float, x: Tensor) -> Tensor:
    update = scale * (b @ a)
    if isinstance(plain, nn.Embedding):
        update = update.t()
    if isinstance(plain, nn.modules.conv._ConvTransposeNd):
        update = _transposed(plain, update)
    return functional_call(plain, {"weight": plain.weight + update.reshape(plain.weight.shape)}, (x,))


def _transposed(plain: nn.modules.conv._ConvTransposeNd, update: Tensor) -> Tensor:
    """``update`` (out, in/groups * kernel) as the weight (in, out/groups, kernel) is stored, entry by entry."""
    out, inputs = plain.out_channels // plain.groups, plain.in_channels // plain.groups
    by_output = update.view(plain.out_channels, inputs, *plain.kernel_size)
    rows = [[by_output[i // inputs * out + o, i % inputs] for o in range(out)] for i in range(plain.in_channels)]
    return torch.stack([torch.stack(row) for row in rows])


def test_a_transposed_convolution_called_with_an_output_size():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1).double()
    model, x = nn.ModuleDict({"up": layer}), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    lp.apply(model, lp.LoRA(r=3, alpha=3, targets=["up"], adapter_dtype="float64"))
    adapter = perturb(model, scale=1.0)["up"].adapters["default"]
    with torch.no_grad():
        plain.weight += _transposed(plain, adapter.lora_B @ adapter.lora_A)
    for size in ((13, 16), (14, 18), (15, 17)):
        close(layer(x, output_size=size), plain(x, output_size=size), 1e-11)


@pytest.mark.parametrize("kdim", [None, 6])
def test_lora_on_attention_is_the_dense_update(kdim: int | None):
    attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True).double()
    model = nn.ModuleDict({"attention": attention})
    plain = copy.deepcopy(attention).requires_grad_(False)
    lp.apply(model, lp.LoRA(r=3, alpha=5, targets=["attention"], adapter_dtype="float64"))
    perturb(model, scale=1.0)
    adapters = attention.adapters["default"].weights()
    assert len(adapters) == (2 if kdim is None else 4)
    query, memory = (torch.randn(2, 5, width, dtype=torch.float64) for width in (8, kdim or 8))
    weights = {k: plain.get_parameter(k) + 5 / 3 * (a.lora_B @ a.lora_A) for k, a in adapters.items()}
    expected = functional_call(plain, weights, (query, memory, memory))[0]
    output = attention(query, memory, memory)[0]
    close(output, expected, 1e-11)
    wanted = [p for a in adapters.values() for p in (a.lora_A, a.lora_B)]
    ours, theirs = (torch.autograd.grad(y.pow(2).sum(), wanted) for y in (output, expected))
    for mine, reference in zip(ours, theirs):
        close(mine, reference, 1e-10)


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *TRANSPOSED, *OTHERS])
@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_lora_is_the_dense_update(layer: str, merged: bool):
    make, shape = {**CONVOLUTIONS, **TRANSPOSED, **OTHERS}[layer]
    model = nn.Sequential(make()).double()
    plain = copy.deepcopy(model[0]).requires_grad_(False)
    lp.apply(model, lp.LoRA(r=3, alpha=5, targets=["0"], adapter_dtype="float64"))
    perturb(model, scale=1.0)
    ((_, host),) = hosts(model)
    adapter = host.adapters["default"]
    if isinstance(shape, Tensor):
        xs = [shape, shape]
    else:
        x = torch.randn(shape, dtype=torch.float64)
        xs = [x.clone().requires_grad_() for _ in range(2)]
    if layer == "embedding padding":  # starts at zero and stays there, because it gets no gradient
        adapter.lora_A.data[:, 3] = 0
    reference = [adapter.lora_A, adapter.lora_B]
    expected = _dense(plain, *reference, 5 / 3, xs[0])
    if merged:
        lp.merge(model)
        close(model(xs[1]), expected, 1e-11)
        return
    output = model(xs[1])
    close(output, expected, 1e-11)
    weights = torch.randn_like(expected)
    inputs = [[*reference, *([x] if x.is_floating_point() else [])] for x in xs]
    wanted = torch.autograd.grad((expected * weights).sum(), inputs[0])
    for ours, theirs in zip(torch.autograd.grad((output * weights).sum(), inputs[1]), wanted):
        close(ours, theirs, 1e-10)
