import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.methods.fitting import (
    BATCHES,
    SMALL,
    TOKENS,
    ConvNet,
    bert,
    encoder,
    fit_and_resume,
    llama,
    moved,
    run,
    seeded,
)


class Norms(nn.Module):
    """All kinds of norm layers, and linear layers without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, groups=1, bias=False)
        self.layers = nn.ModuleList(
            [
                nn.BatchNorm2d(8),
                nn.GroupNorm(2, 8),
                nn.InstanceNorm2d(8, affine=True),
                nn.LayerNorm((8, 4, 4)),
                nn.LayerNorm(4, bias=False),
                nn.RMSNorm(4),
                nn.LayerNorm(4, elementwise_affine=False),
                nn.Linear(4, 4, bias=False),
            ]
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean((2, 3)))


def rough(model: nn.Module) -> nn.Module:
    """Norm layers with weights and statistics other than ones and zeros."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(
                torch.linspace(0.1, 0.5, tensor.numel()).view(tensor.shape), alpha=0.5 if "norm" in name else 0.2
            )
    return model


def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaModel

    return rough(seeded(lambda: GemmaModel(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8))))


IMAGES = torch.linspace(-3, 3, 2 * 3 * 6 * 6).cos().view(2, 3, 6, 6)
CASES = [
    # Twice the outputs of each layer; norms without a place for a bias have one vector.
    (lambda: rough(seeded(Norms)), IMAGES, 2 * (8 + 8 + 8 + 8 + 128 + 4 + 4) + 4),
    (lambda: rough(seeded(ConvNet)), IMAGES, 2 * (8 + 4 * 4 * 8)),
    (encoder, BATCHES[encoder], 3 * 2 * (48 + 16 + 32 + 16 + 16 + 16)),
    (llama, TOKENS, 3 * 2 * (16 + 8 + 8 + 16 + 32 + 32 + 16) + 7 * 16),
    (gemma, TOKENS, 3 * 2 * (16 + 8 + 8 + 16 + 32 + 32 + 16) + 7 * 16),
]


@pytest.mark.parametrize(("make", "x", "count"), CASES, ids=["norms", "conv", "encoder", "llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_count_merge_and_unmerge(make, x, count, dtype):
    model = make().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        before = run(model, x)
        assert lp.apply(model, lp.SSF()).trainable == count
        torch.testing.assert_close(run(model, x), before, rtol=1e-5, atol=2e-6)
        changed = run(moved(model), x)
        assert (changed - before).abs().max() > 1e-2
        with lp.disabled(model):
            torch.testing.assert_close(run(model, x), before, rtol=1e-5, atol=2e-6)
        keys = set(model.state_dict())
        lp.merge(model)
        torch.testing.assert_close(run(model, x), changed, rtol=1e-4, atol=1e-5)
        lp.unmerge(model)
        assert torch.equal(run(model, x), changed)
        assert set(model.state_dict()) == keys
        plain = lp.unload(copy.deepcopy(model), merge=True)
        torch.testing.assert_close(run(plain, x), changed, rtol=1e-4, atol=1e-5)
        assert not any("adapters" in key for key in plain.state_dict())


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 8), nn.Conv1d(4, 8, 3), nn.Conv3d(4, 8, 2, bias=False), nn.GroupNorm(2, 4)]
)
def test_is_a_scale_and_a_shift_of_the_output(layer):
    size = {nn.Linear: (3, 4), nn.Conv1d: (2, 4, 5), nn.Conv3d: (2, 4, 3, 3, 3), nn.GroupNorm: (2, 4, 5)}[type(layer)]
    x = torch.randn(size, dtype=torch.float64)
    model = nn.Sequential(layer).double()
    base = model(x)
    lp.apply(model, lp.SSF(targets="0", adapter_dtype="float64"))
    adapter = moved(model)[0].adapters["default"]
    axis = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(model(x), base * adapter.scale.view(axis) + adapter.shift.view(axis))
    model(x).square().sum().backward()
    for parameter in (adapter.scale, adapter.shift):  # compare with finite differences
        found, step = parameter.grad[1].item(), 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[1] += sign * step
                losses.append(model(x).square().sum().item())
                parameter[1] -= sign * step
        assert found == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_a_norm_that_is_no_function_of_its_weight_is_left_alone_and_named():
    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.square()

    model = nn.Sequential(nn.Linear(4, 4), OddNorm(), nn.Linear(4, 2))
    report = lp.apply(copy.deepcopy(model), lp.SSF())
    assert any(note.startswith("1: not adapted") for note in report.notes)
    with pytest.raises(ValueError, match=r"'1' \(OddNorm\) is not a multiple of its weight"):
        lp.apply(model, lp.SSF(targets="1"))


def test_plan_under_a_strategy_that_builds_on_the_meta_device_in_half_precision():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert lp.inspect(gemma_on_meta(), lp.SSF()).trainable == CASES[-1][2]
    finally:
        torch.set_default_dtype(before)


def gemma_on_meta() -> nn.Module:
    from transformers import GemmaConfig, GemmaModel

    return GemmaModel(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8))


def test_bert_and_the_head_is_left_out():
    report = lp.apply(bert(), lp.SSF(targets="all-norms"))
    assert report.trainable == 7 * 2 * 16
    model = ConvNet()
    lp.apply(model, lp.SSF())
    assert not hasattr(model.head, "adapters")
    model = ConvNet()
    lp.apply(model, lp.SSF(targets=["head", "stem"]))
    assert hasattr(model.head, "adapters")


def test_frozen_statistics_do_not_move():
    model = ConvNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lp.apply(model, lp.SSF())
    model.train()
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in lp.trainable_parameters(model))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_compile_copy_and_state():
    torch._dynamo.reset()
    model, x = encoder(), BATCHES[encoder]
    lp.apply(model, lp.SSF(), lp.LoRA(name="second"))
    expected = run(moved(model, 0.05), x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(run(copy.deepcopy(model), x), expected)
    fresh = encoder()
    lp.apply(fresh, lp.SSF(), lp.LoRA(name="second"))
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    assert torch.equal(run(fresh, x), expected)
    with torch.no_grad():
        lp.merge(model)
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


def test_normal_init_is_near_the_base():
    model, x = encoder(), BATCHES[encoder]
    base = run(model, x)
    lp.apply(model, lp.SSF(init="normal"))
    assert 1e-4 < (run(model, x) - base).abs().max() < 1


def test_fit(tmp_path):
    fit_and_resume(lambda: lp.SSF(trainable="head"), tmp_path)


def test_bad_input():
    with pytest.raises(ValueError, match="init must be one of"):
        lp.SSF(init="zero")
    with pytest.raises(ValueError, match="cannot have a shift"):
        lp.apply(bert(), lp.SSF(targets="word_embeddings"))
    with pytest.raises(lp.TargetError, match="matches nothing"):
        lp.apply(bert(), lp.SSF(targets="LayerNrm"))
    with pytest.raises(ValueError, match="shares the bias"):
        lp.apply(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4)}), lp.SSF(targets="k_proj_weight"))
