import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.methods.fitting import (
    BATCHES,
    TOKENS,
    ConvNet,
    bert,
    encoder,
    fit_and_resume,
    gpt2,
    llama,
    moved,
    run,
    seeded,
)

peft = pytest.importorskip("peft")


def method(**options):
    return lp.IA3(**options)


@pytest.mark.parametrize(("make", "count"), [(bert, 3 * 64), (llama, 3 * 48), (gpt2, 3 * (48 + 64)), (encoder, 3 * 80)])
def test_defaults_scale_keys_values_and_feedforward(make, count):
    model, x = make(), BATCHES[make]
    with torch.no_grad():
        before = run(model, x)
        assert lp.apply(model, method()).trainable == count
        torch.testing.assert_close(run(model, x), before, rtol=1e-5, atol=2e-6)
        changed = run(moved(model), x)
        assert (changed - before).abs().max() > 1e-3
        with lp.disabled(model):
            torch.testing.assert_close(run(model, x), before, rtol=1e-5, atol=2e-6)
        lp.merge(model)
        torch.testing.assert_close(run(model, x), changed, rtol=1e-4, atol=1e-5)
        lp.unmerge(model)
        assert torch.equal(run(model, x), changed)


def as_peft(model, targets, feedforward):
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize(
    ("make", "theirs", "feedforward", "ours"),
    [
        (llama, ["k_proj", "v_proj", "down_proj"], ["down_proj"], {}),
        (gpt2, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"], {}),
        (bert, ["key", "value", "output.dense"], ["output.dense"], "same"),
    ],
)
def test_parity_with_peft(make, theirs, feedforward, ours):
    model = make()
    other = as_peft(model, theirs, feedforward)
    lp.apply(model, method(**({"targets": theirs, "feedforward_targets": feedforward} if ours == "same" else ours)))
    mine = {n.replace(".adapters.default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    moved(model)
    same = {n.removeprefix("base_model.model.").removesuffix(".default"): p for n, p in other.named_parameters()}
    same = {n: p for n, p in same.items() if p.requires_grad}
    assert mine.keys() == same.keys()
    with torch.no_grad():
        for name, parameter in same.items():
            assert parameter.shape == mine[name].shape
            parameter.copy_(mine[name])
    a, b = run(model, TOKENS), run(other, TOKENS)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    a.square().mean().backward()
    b.square().mean().backward()
    for name, parameter in same.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_parity_with_peft_on_convolutions_where_it_is_right():
    # peft scales a grouped convolution's input too, so that the comparison covers groups, dilation and padding modes.
    model, x = seeded(ConvNet), torch.randn(2, 3, 10, 10)
    other = as_peft(model, ["conv1", "conv2"], ["conv2"])
    lp.apply(model, method(targets=["conv1"], feedforward_targets=["conv2"]))
    moved(model)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("base_model.model.").replace("ia3_l.default", "adapters.default.ia3_l")
                parameter.copy_(state[name].view(parameter.shape))
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)
        expected = model(x)
        lp.merge(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_merge_of_convolutions_in_double():
    model, x = seeded(ConvNet).double(), torch.randn(2, 3, 10, 10, dtype=torch.float64)
    lp.apply(model, method(targets=["stem", "conv1"], feedforward_targets="conv2", adapter_dtype="float64"))
    expected = moved(model)(x)
    lp.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_embedding_scales_its_rows_and_merges():
    model = bert()
    lp.apply(model, method(targets="word_embeddings", feedforward_targets=()))
    with torch.no_grad():
        expected = run(moved(model), TOKENS)
        lp.merge(model)
        torch.testing.assert_close(run(model, TOKENS), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is an embedding, so it has no input to scale"):
        lp.apply(bert(), method(targets=(), feedforward_targets="word_embeddings"))


def test_experts_have_a_scale_each():
    from transformers import MixtralConfig, MixtralModel

    from tests.methods.fitting import SMALL

    config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    model = seeded(lambda: MixtralModel(config))
    assert lp.apply(model, method()).trainable == 3 * (2 * 8 + 2 * 32)
    with torch.no_grad():
        expected = run(moved(model), TOKENS)
        lp.merge(model)
        torch.testing.assert_close(run(model, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_base_keeps_small_scales():
    layer = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    lp.apply(layer, method(targets="0", feedforward_targets=()))
    x = torch.randn(64, 4).bfloat16()
    base = layer(x)
    with torch.no_grad():
        lp.trainable_parameters(layer)[0].fill_(1 + 0.75 * 2**-8)  # a bfloat16 parameter would round this to 1
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), base)


@pytest.mark.parametrize("make", [bert, encoder])
def test_with_another_adapter_in_either_order(make):
    for methods in ([method(name="a"), lp.LoRA(name="b")], [lp.LoRA(name="b"), method(name="a")]):
        model, x = make(), BATCHES[make]
        lp.apply(model, *methods)
        with torch.no_grad():
            expected = run(moved(model, 0.1), x)
            lp.merge(model)
            torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


def test_compile_and_state():
    torch._dynamo.reset()
    model, x = encoder(), BATCHES[encoder]
    lp.apply(model, method())
    expected = run(moved(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, x), expected)
    fresh = encoder()
    lp.apply(fresh, method())
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    assert torch.equal(run(fresh, x), expected)


def test_fit(tmp_path):
    fit_and_resume(lambda: lp.IA3(trainable="head"), tmp_path)


def test_bad_input():
    with pytest.raises(lp.TargetError, match="both empty"):
        lp.IA3(targets=(), feedforward_targets=())
    with pytest.raises(lp.TargetError, match=r"key and value projections of an attention.*targets=\(\)"):
        lp.apply(ConvNet(), lp.IA3())
    with pytest.raises(lp.TargetError, match="nearest: v_proj"):
        lp.apply(llama(), lp.IA3(targets="v_prj"))
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4, vdim=4)})
    with pytest.raises(ValueError, match="shares the bias"):
        lp.apply(attention, lp.IA3(feedforward_targets=()))
