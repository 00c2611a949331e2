"""Prefix tuning as a method: counts, gates, targets, composition, resume, and its errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapters.attention_prefix import AttentionError
from lightning_peft.methods.prefix_tuning import PrefixAdapter
from tests.methods.test_prefix_tuning import IDS, _inputs, _misfit, prefixes
from tests.methods.tiny import Attention, Classifier, gpt2, llama, randomise, t5, trainer, vit


def test_counts_equal_the_formulas():
    assert lp.apply(llama(), lp.PrefixTuning(5)).trainable == 5 * 3 * (16 + 16)  # grouped: 2 key heads of 8
    assert lp.apply(gpt2(), lp.PrefixTuning(5)).trainable == 5 * 3 * 64
    assert lp.apply(vit(), lp.PrefixTuning(5, gate=True)).trainable == 3 * (5 * 64 + 1)
    made = lp.apply(llama(), lp.PrefixTuning(5, bottleneck_size=6)).trainable
    assert made == 5 * 16 + (16 * 6 + 6) + 3 * (6 * 32 + 32)


def test_gate_starts_as_the_base():
    for make in (llama, t5):
        model = make()
        base = model(**_inputs(make)).logits
        lp.apply(model, lp.PrefixTuning(4, gate=True))
        torch.testing.assert_close(model(**_inputs(make)).logits, base)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_gate_adds_attention_over_the_prefix_alone(impl):
    model = llama()
    model.set_attn_implementation(impl)
    lp.apply(model, lp.PrefixTuning(4, gate=True, layers=[0]))
    randomise(model)
    seen = {}
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda m, i, o: seen.update(q=o))
    attention.o_proj.register_forward_hook(lambda m, i, o: seen.update(x=i[0]))
    model(IDS[:1, :1])  # one token at position 0: no rotation
    adapter = prefixes(model)[0]
    q = seen["q"].view(1, 1, 4, 8).transpose(1, 2)
    k, v = (t.view(4, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for t in adapter.key_values())
    expected = adapter.gate * ((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(1, 1, 32)
    after = seen["x"]
    with lp.disabled(model):
        model(IDS[:1, :1])
    torch.testing.assert_close(after - seen["x"], expected, rtol=1e-4, atol=1e-5)


def test_layers_and_exclude_choose():
    model = llama()
    lp.apply(model, lp.PrefixTuning(4, layers=[0, -1]))
    assert [n for n, m in model.named_modules() if isinstance(m, PrefixAdapter)] == [
        "model.layers.0.self_attn.adapters.default",
        "model.layers.2.self_attn.adapters.default",
    ]
    report = lp.apply(t5(), lp.PrefixTuning(4, exclude="decoder"))
    assert all(name.startswith("encoder") for name in report.modules)


def test_fold_keeps_the_function_and_the_plain_state_loads():
    model = llama()
    method = lp.PrefixTuning(4, bottleneck_size=6)
    lp.apply(model, method)
    randomise(model, 0.5)
    before = model(IDS).logits
    assert len(lp.fold(model)) == 3
    torch.testing.assert_close(model(IDS).logits, before)
    assert sum(p.numel() for p in lp.trainable_parameters(model)) == 4 * 3 * 32
    fresh = llama()
    lp.apply(fresh, lp.PrefixTuning(4))
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    torch.testing.assert_close(fresh(IDS).logits, before)
    assert method.bottleneck_size == 6
    with pytest.raises(ValueError, match="nothing to fold"):
        lp.fold(model)


def test_composes_with_lora_and_a_second_prefix():
    for impl in ("sdpa", "eager"):
        outs = []
        for order in (1, -1):
            model = llama()
            model.set_attn_implementation(impl)
            methods = [lp.PrefixTuning(4, name="p"), lp.LoRA(r=2, targets="q_proj"), lp.PrefixTuning(2, name="p2")]
            lp.apply(model, *methods[::order])
            randomise(model, 0.0)
            g = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
                    p.normal_(generator=g)
            outs.append(model(IDS).logits)
        torch.testing.assert_close(*outs)
        with lp.active(model, "p"):
            assert not torch.allclose(model(IDS).logits, outs[0], atol=1e-3)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    lp.apply(layer, lp.LoRA(r=2, targets="self_attn"), lp.PrefixTuning(4, name="p"), lp.PrefixTuning(2, name="q"))
    randomise(layer)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer.self_attn(x, x, x)[0], layer.self_attn(x, x, x, need_weights=False)[0])


def test_the_merge_error_gives_the_reason():
    model = llama()
    lp.apply(model, lp.PrefixTuning(4))
    with pytest.raises(lp.MergeError, match=r"'default' at 'model.layers.0.self_attn' \(PrefixAdapter\)"):
        lp.merge(model)


def test_copies_pickles_and_unloads():
    model = llama()
    base = model(IDS).logits
    lp.apply(model, lp.PrefixTuning(4, bottleneck_size=6))
    randomise(model)
    out = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IDS).logits, out, rtol=0, atol=0)
        source = prefixes(other)[0].source
        assert all(a._source[0] is source for a in prefixes(other))
    lp.unload(model)
    assert torch.equal(model(IDS).logits, base)


def test_half_precision_base_keeps_a_float32_prefix():
    model = llama().bfloat16()
    lp.apply(model, lp.PrefixTuning(4))
    assert all(p.dtype == torch.float32 for p in lp.trainable_parameters(model))
    out = model(IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = llama()
        lp.apply(m, lp.PrefixTuning(4, gate=True))
        m(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("bottleneck", [None, 6])
def test_fit_and_resume_bit_for_bit(tmp_path, bottleneck):
    def method():
        return lp.PrefixTuning(4, bottleneck_size=bottleneck, trainable="head", seed=1)

    whole = Classifier()
    run = trainer(tmp_path / "a", method(), epochs=2)
    run.fit(whole)
    first = trainer(tmp_path / "b", method(), epochs=1)
    first.fit(Classifier())
    first.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert all("adapters" in k or k.startswith("head") for k in state)
    rest = Classifier()
    trainer(tmp_path / "c", method(), epochs=2).fit(rest, ckpt_path=tmp_path / "one.ckpt")
    for key, value in lp.adapter_state(whole).items():
        assert torch.equal(lp.adapter_state(rest)[key], value), key


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer of at least 1, got 0"),
        ({"bottleneck_size": -1}, "bottleneck_size must be"),
        ({"activation": "sine"}, "activation must be one of 'tanh'"),
        ({"init": "text"}, "init must be one of"),
        ({"init_std": 0}, "init_std must be a number above 0"),
        ({"layers": []}, "layers must be a list of block indices"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.PrefixTuning(**arguments)


def test_bad_targets():
    with pytest.raises(lp.TargetError, match="finds no attention"):
        lp.apply(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), lp.PrefixTuning())
    with pytest.raises(lp.TargetError, match=r"'self_atn' matches nothing; nearest: .*self_attn"):
        lp.apply(llama(), lp.PrefixTuning(targets="self_atn"))
    with pytest.raises(
        lp.TargetError, match=r"which contains attention but is not one itself; nearest: 'model\.layers\.0"
    ):
        lp.apply(llama(), lp.PrefixTuning(targets="layers.0"))
    with pytest.raises(lp.TargetError, match="has no key and value projections"):
        lp.apply(llama(), lp.PrefixTuning(targets="mlp"))
    with pytest.raises(lp.TargetError, match="the model has 3 blocks"):
        lp.apply(llama(), lp.PrefixTuning(layers=[3]))
    with pytest.raises(lp.TargetError, match="no module around the attention takes position_ids"):
        lp.apply(t5(), lp.PrefixTuning(shift_positions=True))
    model = llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(lp.TargetError, match="attn_implementation='sdpa'"):
        lp.apply(model, lp.PrefixTuning())


def test_attention_that_is_not_intercepted_is_an_error():
    class Own(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    with pytest.raises(ValueError, match="Own ran without calling scaled_dot_product_attention"):
        lp.apply(nn.Sequential(Own()), lp.PrefixTuning(3))
    with pytest.raises(AttentionError, match="prefix of width 7 does not fit 4 heads of width 4"):
        _misfit()


def test_positions_move_where_they_are_made_whatever_the_layers():
    """A decoder layer takes positions too, but they are turned into angles before it."""
    outputs = []
    for shift in (False, True):
        torch.manual_seed(1)
        model = llama()
        lp.apply(model, lp.PrefixTuning(5, layers=[0], shift_positions=shift, init="zero"))
        outputs.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(*outputs)  # rotary positions are relative, and a prefix of zeros has no angle
    gpt = [gpt2()]
    gpt.append(copy.deepcopy(gpt[0]))
    for shift, model in zip((False, True), gpt):
        lp.apply(model, lp.PrefixTuning(5, layers=[0], shift_positions=shift, init="zero"))
    assert not torch.allclose(*(model(input_ids=IDS).logits for model in gpt))


def test_a_child_with_in_features_alone_is_passed_by():
    class Quantiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.weight = 16, nn.Parameter(torch.ones(4))

    model = nn.Sequential(Attention())
    model[0].quantiser = Quantiser()
    report = lp.apply(model, lp.PrefixTuning(3))
    assert list(report.modules) == ["0"]
