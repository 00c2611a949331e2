from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp
from lightning_peft.core.targeting.attention_sites import attention_sites
from lightning_peft.methods.prefix_tuning import PrefixAdapter
from tests.methods.tiny import Attention, Block, bert, gpt2, llama, randomise, t5

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 7, dtype=torch.long)
LEFT[1, :3] = 0


def prefixes(model):
    return [m for m in model.modules() if isinstance(m, PrefixAdapter)]


# --- against Hugging Face PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("bottleneck", [None, 6])
def test_outputs_and_gradients_equal_pefts(make, bottleneck):
    import peft

    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        prefix_projection=bottleneck is not None,
        encoder_hidden_size=bottleneck,
    )
    theirs = peft.get_peft_model(make(torch.float64), config).double().eval()
    encoder = theirs.prompt_encoder["default"]

    ours = make(torch.float64)
    lp.apply(ours, lp.PrefixTuning(5, bottleneck_size=bottleneck, shift_positions=True, adapter_dtype="float64"))
    adapters = prefixes(ours)
    with torch.no_grad():
        if bottleneck is None:
            table = encoder.embedding.weight.chunk(2 * len(adapters), 1)
            for i, adapter in enumerate(adapters):
                adapter.prefix_keys.copy_(table[2 * i])
                adapter.prefix_values.copy_(table[2 * i + 1])
        else:
            source = adapters[0].source
            source.embedding.copy_(encoder.embedding.weight)
            source.down.load_state_dict(encoder.transform[0].state_dict())
            for i, adapter in enumerate(adapters):
                adapter.up.weight.copy_(encoder.transform[2].weight.chunk(len(adapters))[i])
                adapter.up.bias.copy_(encoder.transform[2].bias.chunk(len(adapters))[i])

    for mask in (None, LEFT, LEFT.flip(1)):
        ours.zero_grad()
        theirs.zero_grad()
        labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
        a = ours(input_ids=IDS, attention_mask=mask, labels=labels)
        b = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS) if mask is None else mask, labels=labels)
        valid = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(a.logits[valid], b.logits[valid])
        torch.testing.assert_close(a.loss, b.loss)
        a.loss.backward()
        b.loss.backward()
        if bottleneck is None:
            got = torch.cat([g for x in adapters for g in (x.prefix_keys.grad, x.prefix_values.grad)], 1)
            torch.testing.assert_close(got, encoder.embedding.weight.grad)
        else:
            torch.testing.assert_close(adapters[0].source.embedding.grad, encoder.embedding.weight.grad)
            torch.testing.assert_close(adapters[0].source.down.weight.grad, encoder.transform[0].weight.grad)
            torch.testing.assert_close(
                torch.cat([x.up.weight.grad for x in adapters]), encoder.transform[2].weight.grad
            )


def test_shifted_positions_are_those_the_user_gives_plus_the_length():
    model = llama()
    lp.apply(model, lp.PrefixTuning(5, shift_positions=True))
    randomise(model)
    given = torch.arange(7).unsqueeze(0)
    torch.testing.assert_close(model(IDS, position_ids=given).logits, model(IDS).logits)
    torch.testing.assert_close(model(IDS, None, given).logits, model(IDS).logits)
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    torch.testing.assert_close(model(IDS[:, 4:], past_key_values=cache).logits, model(IDS).logits[:, 4:])


# --- against the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_hand_written_attention_equals_the_definition(causal):
    torch.manual_seed(0)
    module = nn.Sequential(Attention(causal=causal)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    lp.apply(module, lp.PrefixTuning(3, adapter_dtype="float64"))
    randomise(module)
    (adapter,) = prefixes(module)
    q, k, v = module[0].qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
    k, v = (
        torch.cat([p.view(3, 4, 4).transpose(0, 1).expand(2, -1, -1, -1), t], 2)
        for p, t in ((adapter.prefix_keys, k), (adapter.prefix_values, v))
    )
    scores = q @ k.transpose(-2, -1) / 2
    if causal:
        scores[..., 3:] += torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    expected = module[0].proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", ["bool", "float", "one column", "one row"])
def test_masks_of_every_kind_are_widened(kind):
    class Masked(Attention):
        def forward(self, x, mask=None):
            n, length, _ = x.shape
            q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, mask)

    module = nn.ModuleDict({"a": Masked()})
    lp.apply(module, lp.PrefixTuning(3))
    randomise(module)
    x = torch.randn(2, 5, 16)
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = {
        "bool": keep,
        "float": torch.zeros(5, 5).masked_fill(~keep, float("-inf")),
        "one column": torch.ones(5, 1, dtype=torch.bool),
        "one row": torch.tensor([True, True, False, True, False]).view(1, 1, 1, 5),
    }[kind]
    wide = F.pad(mask.expand(*mask.shape[:-1], 5), (3, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
    q, k, v = module["a"].qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
    keys, values = (p.view(3, 4, 4).transpose(0, 1).expand(2, -1, -1, -1) for p in prefixes(module)[0].key_values())
    expected = F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), wide)
    torch.testing.assert_close(module["a"](x, mask), expected)


def test_grouped_queries_inside_the_attention_call():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x, flat=False):
            q, k, v = (p(x).view(2, 5, -1, 4).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            if flat:  # heads repeated and folded into the batch, as older code does
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
                q, k, v = (t.reshape(8, 5, 4) for t in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).view(2, 4, 5, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for gate in (False, True):
        model = nn.ModuleDict({"attention": Grouped()})
        lp.apply(model, lp.PrefixTuning(3, gate=gate))
        randomise(model)
        assert attention_sites(model)["attention"].key_width == 8
        x = torch.randn(2, 5, 16)
        if not gate:
            torch.testing.assert_close(model["attention"](x, flat=True), model["attention"](x))
        assert model["attention"](x).shape == (2, 4, 5, 4)


def _misfit():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.mix(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    model = nn.ModuleDict({"odd": Odd()})
    lp.apply(model, lp.PrefixTuning(3, kv_dim=7, targets="odd"))
    model["odd"](torch.randn(2, 5, 16))


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(options, masked):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(16, 4, batch_first=True, **options).eval()
    model = nn.ModuleDict({"m": mha})
    q = torch.randn(2, 5, 16)
    k, v = torch.randn(2, 6, options.get("kdim", 16)), torch.randn(2, 6, options.get("vdim", 16))
    extra = {}
    if masked:
        drop = torch.zeros(2, 6, dtype=torch.bool)
        drop[1, 4:] = True
        extra = {"key_padding_mask": drop, "attn_mask": torch.randn(5, 6)}
    plain, plain_weights = mha(q, k, v, **extra)
    lp.apply(model, lp.PrefixTuning(3))
    adapter = prefixes(model)[0]
    with torch.no_grad():  # keys so unlike the queries that no attention goes to them
        adapter.prefix_values.normal_()
        adapter.prefix_keys.fill_(0)
    far, weights = mha(q, k, v, **extra)
    assert weights.shape == plain_weights.shape
    assert (weights.sum(-1) < plain_weights.sum(-1)).all()
    fast, none = mha(q, k, v, need_weights=False, **extra)
    assert none is None
    torch.testing.assert_close(fast, far)
    assert not torch.allclose(far, plain, atol=1e-3)
    with lp.disabled(model):
        torch.testing.assert_close(mha(q, k, v, **extra)[0], plain)
    # A gated prefix leaves torch's own function as the reference.
    gated = nn.ModuleDict({"m": copy.deepcopy(mha)})
    lp.unload(gated)
    lp.apply(gated, lp.PrefixTuning(3, gate=True))
    for need in (True, False):
        torch.testing.assert_close(gated["m"](q, k, v, need_weights=need, **extra)[0], plain)
    with torch.no_grad():
        torch.testing.assert_close(gated["m"](q, k, v, need_weights=False, **extra)[0], plain)


def test_multihead_attention_unbatched_length_first_and_per_head_masks():
    mha = nn.MultiheadAttention(16, 4).eval()
    x, mask = torch.randn(5, 2, 16), torch.randn(8, 5, 5)
    plain = mha(x, x, x, attn_mask=mask)
    one = mha(x[:, 0], x[:, 0], x[:, 0], average_attn_weights=False)
    lp.apply(mha, lp.PrefixTuning(3, gate=True))
    for a, b in zip(plain, mha(x, x, x, attn_mask=mask)):
        torch.testing.assert_close(a, b)
    for a, b in zip(one, mha(x[:, 0], x[:, 0], x[:, 0], average_attn_weights=False)):
        torch.testing.assert_close(a, b)


def test_encoder_layers_leave_their_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3)
    x = torch.randn(2, 5, 16)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    lp.apply(model, lp.PrefixTuning(3))
    randomise(model)
    trained = model.train()(x, src_key_padding_mask=pad)
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=pad)
    torch.testing.assert_close(trained[~pad], evaluated[~pad])
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 3).eval()
    assert len(lp.apply(decoder, lp.PrefixTuning(3, targets="multihead_attn")).modules) == 3
    assert decoder(x, x).shape == x.shape


# --- Hugging Face models -----------------------------------------------------------------------------------------


def _inputs(make):
    return {"input_ids": IDS, "attention_mask": LEFT} | ({"decoder_input_ids": IDS} if make is t5 else {})


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_eager_equals_sdpa(make):
    models = make(), make()
    models[1].set_attn_implementation("eager")
    outs = []
    for model in models:
        base = model(**_inputs(make)).logits
        lp.apply(model, lp.PrefixTuning(4))
        randomise(model)
        outs.append(model(**_inputs(make)).logits)
        assert not torch.allclose(outs[-1], base, atol=1e-3)
        with lp.disabled(model):
            torch.testing.assert_close(model(**_inputs(make)).logits, base)
    valid = LEFT.bool() if make in (llama, gpt2) else slice(None)
    torch.testing.assert_close(outs[0][valid], outs[1][valid])
    weights = models[1](**_inputs(make), output_attentions=True)
    weights = weights.encoder_attentions if make is t5 else weights.attentions
    assert weights[0].shape[-2:] == (7, 7)
    assert models[1].config._attn_implementation == "eager"


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_cache_holds_no_prefix(make):
    model = make()
    lp.apply(model, lp.PrefixTuning(4))
    randomise(model)
    whole = model(IDS).logits
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(model(IDS[:, 4:], past_key_values=cache).logits, whole[:, 4:])
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": LEFT, "pad_token_id": 0}
    made = model.generate(IDS, **options)
    assert torch.equal(made, model.generate(IDS, use_cache=False, **options))
    assert torch.equal(made, model.generate(IDS, cache_implementation="static", **options))


def test_encoder_decoder_generates_with_self_and_cross_prefixes():
    model = t5()
    report = lp.apply(model, lp.PrefixTuning(4))
    assert len(report.modules) == 9
    randomise(model)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": LEFT}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))
    only = t5()
    assert len(lp.apply(only, lp.PrefixTuning(4, targets="EncDecAttention")).modules) == 3


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_gradient_checkpointing_changes_nothing(make):
    grads = []
    for checkpointing in (False, True):
        model = make().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        if make is t5:
            for m in model.modules():
                m.dropout = 0.0 if isinstance(getattr(m, "dropout", None), float) else getattr(m, "dropout", None)
        lp.apply(model, lp.PrefixTuning(4, bottleneck_size=6))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**_inputs(make)).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("kind", ["llama", "eager", "blocks", "mha"])
def test_compiles_without_graph_breaks(kind):
    if kind in ("llama", "eager"):
        model = llama()
        model.set_attn_implementation("sdpa" if kind == "llama" else "eager")
        args = (IDS,)
    elif kind == "blocks":
        model, args = nn.Sequential(Block(), Block()), (torch.randn(2, 5, 16),)
    else:
        model, args = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), (torch.randn(2, 5, 16),)
    lp.apply(model, lp.PrefixTuning(4))
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = (f(*args) for f in (model, compiled))
    torch.testing.assert_close(*((t.logits if hasattr(t, "logits") else t) for t in (a, b)))
