"""Test that adapters that would fail in the first forward are refused before anything is changed."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers import close


class ByHand(nn.Module):
    """Attention that multiplies queries and keys itself, as timm's Swin and MONAI's SABlock do."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(-2, -3).flatten(-2))


class Called(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Windows(nn.Module):
    """A block on maps (batch, height, width, channels)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = Called(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x.flatten(1, 2)).view_as(x)


class Rotary(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = Called(width)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        return x + self.attn(x * rotary)


class Net(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(attention() for _ in range(3))
        self.register_buffer("rotary", torch.rand(5, 8))
        self.head = nn.Linear(8, 2)
        self.example_input_array = torch.zeros(2, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            if isinstance(block, Windows):
                x = block(x.unsqueeze(1)).squeeze(1)
            else:
                x = block(x, self.rotary) if isinstance(block, Rotary) else x + block(x)
        return self.head(x.mean(1))


class Task(L.LightningModule):
    """Does not define a forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


MISFITS = {
    "prefix by hand": (ByHand, lambda: lp.PrefixTuning(3), "ByHand ran without calling scaled_dot_product_attention"),
    "windows": (Windows, lambda: lp.VisualPromptTuning(3), r"Windows was called with \(2, 1, 5, 8\)"),
    "rotary": (Rotary, lambda: lp.VisualPromptTuning(3), "Rotary was called with rotary of shape"),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_is_refused_before_anything_is_changed(misfit, inside):
    attention, method, why = MISFITS[misfit]
    net = Net(attention)
    model = Task(net) if inside else net
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call in (lp.inspect, lp.apply):
        with pytest.raises(ValueError, match=f"in a trial forward: {why}"):
            call(model, method())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(net) is Net
    assert type(net.blocks[0]) is attention


class RotaryPatches(nn.Module):
    """A block that rotates the patches and leaves a class token before them, as timm's EVA-02 does."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = Called(width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        return x + self.attn(torch.cat([x[:, :1], x[:, 1:] * rope], dim=1))


class Patches(nn.Module):
    """Takes images of one size only: a position is learned for each of its patches, and one for a class token."""

    def __init__(self, attention: type[nn.Module], size: int = 12) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (size // 4) ** 2, 8))
        self.register_buffer("rope", torch.rand((size // 4) ** 2, 8))
        self.blocks = nn.ModuleList(attention() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, 8), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x, self.rope) if isinstance(block, RotaryPatches) else x + block(x)
        return self.head(x[:, 0])


def test_the_size_of_images_follows_from_the_positions():
    for model in (Patches(ByHand), Task(Patches(ByHand))):
        with pytest.raises(ValueError, match="in a trial forward: ByHand ran without calling"):
            lp.apply(model, lp.PrefixTuning(3))
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"in a trial forward: RotaryPatches was called with rope of shape \(9, 8\)"):
        lp.apply(Patches(RotaryPatches), lp.VisualPromptTuning(3))
    model = Patches(Called)
    lp.apply(model, lp.PrefixTuning(3))
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 2)


def test_adapters_that_fit_are_applied_as_without_a_trial():
    torch.manual_seed(0)
    model, plain = Net(Called), Net(Called)
    plain.load_state_dict(model.state_dict())
    plain.example_input_array = None  # its first layer still takes the same input
    state = torch.random.get_rng_state()
    for net in (model, plain):
        lp.apply(net, lp.PrefixTuning(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.randn(2, 5, 4)
    close(model(x), plain(x))


def test_without_a_known_input_it_is_found_in_the_first_forward():
    model = Net(ByHand)
    model.forward = lambda x, y: Net.forward(model, x)  # type: ignore[method-assign]
    model.example_input_array = None
    lp.apply(model, lp.PrefixTuning(3))
    with pytest.raises(RuntimeError, match="ran without calling scaled_dot_product_attention"):
        Net.forward(model, torch.zeros(2, 5, 4))
