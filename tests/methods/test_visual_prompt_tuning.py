from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.families.prompt_adapters import TokenError
from lightning_peft.methods.visual_prompt_tuning import BlockPrompt
from tests.kinds import KINDS
from tests.methods.tiny import Classifier, ViT, randomise, trainer, vit

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def make_own():
    torch.manual_seed(0)
    return ViT().eval()


def prompts(model):
    return [m.prompt for m in model.modules() if isinstance(m, BlockPrompt) and m.prompt is not None]


@pytest.mark.parametrize("deep", [False, True])
def test_equals_the_definition(deep):
    model = make_own().double()
    base = copy.deepcopy(model)
    images = IMAGES.double()
    lp.apply(model, lp.VisualPromptTuning(5, deep=deep, adapter_dtype="float64"))
    randomise(model)
    x = base.patch(images).flatten(2).transpose(1, 2)
    x = torch.cat([base.cls_token.expand(2, -1, -1), x], 1) + base.pos_embed
    for i, block in enumerate(base.blocks):
        if i == 0 or deep:
            rest = x[:, 1:] if i == 0 else x[:, 6:]
            x = torch.cat([x[:, :1], prompts(model)[i].expand(2, -1, -1), rest], 1)
        x = block(x)
    expected = base.norm(torch.cat([x[:, :1], x[:, 6:]], 1))
    torch.testing.assert_close(model.tokens(images), expected)
    assert model.tokens(images).shape == (2, 17, 16)
    grads = torch.autograd.grad(model(images).square().sum(), prompts(model))
    step = 1e-6
    for p, grad in zip(prompts(model), grads):
        with torch.no_grad():
            p[1, 2] += step
            up = model(images).square().sum()
            p[1, 2] -= 2 * step
            down = model(images).square().sum()
            p[1, 2] += step
        torch.testing.assert_close((up - down) / (2 * step), grad[1, 2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("make", [vit, make_own])
def test_counts_lengths_disabled_and_unload(make, deep):
    model = make()
    name = "pixel_values" if make is vit else "x"
    base = model(**{name: IMAGES})
    base = base.logits if make is vit else base
    width = 32 if make is vit else 16
    assert lp.apply(model, lp.VisualPromptTuning(5, deep=deep)).trainable == 5 * width * (3 if deep else 1)
    randomise(model)

    def run(m=model):
        out = m(**{name: IMAGES})
        return out.logits if make is vit else out

    assert not torch.allclose(run(), base, atol=1e-3)
    if make is vit:
        assert model.vit(IMAGES).last_hidden_state.shape == (2, 17, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), run())
    fresh = make()
    lp.apply(fresh, lp.VisualPromptTuning(5, deep=deep, seed=4))
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    assert torch.equal(run(fresh), run())
    with lp.disabled(model):
        assert torch.equal(run(), base)
    with pytest.raises(lp.MergeError, match="BlockPrompt"):
        lp.merge(model)
    lp.unload(model)
    assert torch.equal(run(), base)


def test_initialisation_is_the_papers():
    model = make_own()
    lp.apply(model, lp.VisualPromptTuning(400))
    bound = (6 / (3 * 4 * 4 + 16)) ** 0.5
    (p,) = prompts(model)
    assert 0.98 * bound < p.abs().max() <= bound


def test_leading_tokens_are_found_or_given():
    def leading(model, **options):
        lp.apply(model, lp.VisualPromptTuning(2, **options))
        return next(m for m in model.modules() if isinstance(m, BlockPrompt)).leading

    assert leading(make_own()) == leading(vit()) == 1
    assert leading(make_own(), leading_tokens=0) == 0
    model = make_own()
    model.num_prefix_tokens = 5
    assert leading(model) == 5
    plain = nn.Sequential(*make_own().blocks)
    assert leading(plain) == 0


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_torch_encoder_layers(batch_first, deep):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3)
    lp.apply(model, lp.VisualPromptTuning(5, deep=deep, leading_tokens=1))
    randomise(model)
    x = torch.randn(2, 7, 16) if batch_first else torch.randn(7, 2, 16)
    trained = model.train()(x)
    assert trained.shape == x.shape
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


def test_dropout_only_while_training():
    model = make_own()
    lp.apply(model, lp.VisualPromptTuning(5, dropout=0.5))
    randomise(model)
    assert torch.equal(model(IMAGES), model(IMAGES))
    model.train()
    assert not torch.equal(model(IMAGES), model(IMAGES))


@pytest.mark.parametrize("make", [vit, make_own])
def test_compile_checkpointing_and_half_precision(make):
    model = make()
    lp.apply(model, lp.VisualPromptTuning(5, deep=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = (m(IMAGES) if make is make_own else m(IMAGES).logits for m in (compiled, model))
    torch.testing.assert_close(a, b)
    low = make().bfloat16()
    lp.apply(low, lp.VisualPromptTuning(5, deep=True))
    out = low(IMAGES.bfloat16())
    (out if make is make_own else out.logits).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in prompts(low))
    if make is vit:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(IMAGES).logits.sum().backward()
        checkpointed = [p.grad.clone() for p in prompts(model)]
        model.zero_grad()
        model.gradient_checkpointing_disable()
        model(IMAGES).logits.sum().backward()
        torch.testing.assert_close(checkpointed, [p.grad for p in prompts(model)])


def test_composes_with_lora_prefixes_and_a_second_prompt():
    model = make_own()
    lp.apply(
        model,
        lp.VisualPromptTuning(5, deep=True, name="v"),
        lp.LoRA(r=2),
        lp.PrefixTuning(3, name="p"),
        lp.VisualPromptTuning(2, name="w"),
    )
    model.tokens(IMAGES).square().sum().backward()
    assert model.tokens(IMAGES).shape == (2, 17, 16)
    assert all(p.grad is not None for p in lp.trainable_parameters(model))


def test_fit_and_resume_bit_for_bit(tmp_path):
    def method():
        return lp.VisualPromptTuning(4, deep=True, trainable="head", seed=1, dropout=0.1)

    whole = Classifier()
    trainer(tmp_path / "a", method(), epochs=2).fit(whole)
    first = trainer(tmp_path / "b", method(), epochs=1)
    first.fit(Classifier())
    first.save_checkpoint(tmp_path / "one.ckpt")
    rest = Classifier()
    trainer(tmp_path / "c", method(), epochs=2).fit(rest, ckpt_path=tmp_path / "one.ckpt")
    assert len(lp.adapter_state(whole)) == 5
    for key, value in lp.adapter_state(whole).items():
        assert torch.equal(lp.adapter_state(rest)[key], value), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be"),
        ({"dropout": 2}, "dropout must be a probability"),
        ({"leading_tokens": -1}, "leading_tokens must be an integer of at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.VisualPromptTuning(**arguments)


def test_bad_targets():
    with pytest.raises(lp.TargetError, match="finds no repeated blocks with attention"):
        lp.apply(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), lp.VisualPromptTuning())
    two = nn.Module()
    two.a, two.b = make_own(), make_own()
    with pytest.raises(lp.TargetError, match="belong to several stacks"):
        lp.apply(two, lp.VisualPromptTuning())
    lp.apply(two, lp.VisualPromptTuning(4, targets="a.blocks.?"))
    assert two.a.tokens(IMAGES).shape == (2, 17, 16)
    model = make_own()
    with pytest.raises(ValueError, match=r"in a trial forward.*at least 30 tokens before the patches"):
        lp.apply(model, lp.VisualPromptTuning(4, targets=["blocks.1", "blocks.2"], leading_tokens=30))


def test_blocks_that_get_more_than_patches_are_refused_at_the_first_forward_or_before():
    for kind, argument in {"encoder": "src_key_padding_mask", "mha": "key", "llama": "position"}.items():
        model = KINDS[kind].build()

        def run(model: nn.Module = model, kind: str = kind) -> None:
            lp.apply(model, lp.VisualPromptTuning(2))  # a trial forward finds it if an input is known
            model(*KINDS[kind].batch())

        with pytest.raises((TokenError, ValueError), match=f"{argument}.*does not cover the prompts.*PrefixTuning"):
            run()


@pytest.mark.parametrize("cut", ["convolution", "linear"])
def test_prompts_start_in_the_papers_range(cut):
    """The Xavier bound sqrt(6 / (3 x 4 x 4 + width)) of a patch and a token, for every kind of patch embedding."""
    model = make_own()
    width = model.pos_embed.shape[-1]
    if cut == "linear":
        model.patch = nn.Sequential(nn.Unfold(4, stride=4), nn.Identity(), nn.Linear(48, width))
    lp.apply(model, lp.VisualPromptTuning(500))
    bound = (6 / (48 + width)) ** 0.5
    assert 0.99 * bound < prompts(model)[0].abs().max() <= bound
