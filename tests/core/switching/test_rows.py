"""Compare mixed batches with running the rows one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from tests.helpers import adapter_parameters, close, differ, perturb
from tests.kinds import KINDS, MLP
from tests.table import METHODS

#: the adapters that are mixed in one batch, on a decoder
MIXED: dict[str, Callable[..., Any]] = {
    "lora": lambda name: lp.LoRA(r=2, name=name),
    "rslora": lambda name: lp.LoRA(r=3, use_rslora=True, rank_pattern={"q_proj": 1}, name=name),
    "pissa": lambda name: lp.LoRA(r=2, init="pissa", name=name),
    "adalora": lambda name: lp.AdaLoRA(target_r=2, init_r=3, total_step=100, tinit=1, tfinal=1, name=name),
    "dylora": lambda name: lp.DyLoRA(r=3, name=name),
    "dora": lambda name: lp.DoRA(r=2, name=name),
    "vera": lambda name: lp.VeRA(r=4, name=name),
    "loha": lambda name: lp.LoHa(r=2, name=name),
    "lokr": lambda name: lp.LoKr(r=1, name=name),
    "oft": lambda name: lp.OFT(block_size=4, name=name),
    "ia3": lambda name: lp.IA3(name=name),
    "ssf": lambda name: lp.SSF(name=name),
    "serial": lambda name: lp.BottleneckAdapter("houlsby", bottleneck_size=3, name=name),
    "parallel": lambda name: lp.BottleneckAdapter("parallel", bottleneck_size=3, name=name),
    "blocks": lambda name: lp.BottleneckAdapter(targets="all-blocks", bottleneck_size=3, name=name),
    "prefix": lambda name: lp.PrefixTuning(3, name=name),
    "gated": lambda name: lp.PrefixTuning(2, gate=True, name=name),
    "shifted": lambda name: lp.PrefixTuning(2, shift_positions=True, name=name),
    "prompt": lambda name: lp.PromptTuning(4, name=name),
    "suffix": lambda name: lp.PromptTuning(template="v1 x1 v2 x*", name=name),
    "ptuning": lambda name: lp.PTuning(2, name=name),
}


def llama(*methods: str, attention: str = "sdpa", **config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=29, num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention, **sizes
        )
    )
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    for method in methods:
        lp.apply(model, MIXED[method](method))
    return perturb(model).eval()


def one_by_one(model: nn.Module, names: list[Any], run: Callable[[int], Any]) -> list[Any]:
    """``run(i)`` for each row with only its adapters active."""
    outputs = []
    for i, row in enumerate(names):
        row = () if row is None else (row,) if isinstance(row, str) else row
        with lp.active(model, *row):
            outputs.append(run(i))
    return outputs


def batch(rows: int, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(1, 29, (rows, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        for i in range(rows):
            mask[i, 7 - i % 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in inputs.items()}


@torch.no_grad()
def two_loras() -> nn.Module:
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, name="a"))
    lp.apply(model, lp.LoRA(r=4, name="b"))
    return perturb(model)


def test_averages_written_through_data_are_seen_by_rows():
    model, inputs = llama("lora"), batch(2, padded=False)
    for parameter in (weights := adapter_parameters(model).values()):
        parameter.requires_grad_(True)
    with lp.rows(model, ["lora", None]):
        model(**inputs)
        for parameter in weights:
            parameter.data.copy_(parameter + 0.1)
        got = model(**inputs).logits
    close(got, torch.cat(one_by_one(model, ["lora", None], lambda i: model(**row(inputs, i)).logits)))


@torch.no_grad()
def test_all_methods_in_one_batch():
    names = [name for method in MIXED for name in (method, None)][: 2 * len(MIXED)]
    model, inputs = llama(*MIXED), batch(len(names))
    want = torch.cat(one_by_one(model, names, lambda i: model(**row(inputs, i)).logits))
    lp.set_active(model, "dora")  # the active adapters have no effect
    with lp.rows(model, names):
        got = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    close(got[seen], want[seen])
    with lp.disabled(model):
        differ(got[seen], model(**inputs).logits[seen])


@pytest.mark.parametrize("first", MIXED)
@torch.no_grad()
def test_each_method_beside_lora_and_none(first):
    other = "rslora" if first == "lora" else "lora"
    names = [first, None, other, first]
    model, inputs = llama(first, other), batch(4, padded=False)
    want = torch.cat(one_by_one(model, names, lambda i: model(**row(inputs, i)).logits))
    with lp.rows(model, names):
        close(model(**inputs).logits, want)
        close(model(inputs["input_ids"]).logits, want)  # without a mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_generate(attention):
    methods = ["lora", "dora", "ia3", "prefix", "prompt", "suffix", "parallel"]
    names = [*methods, None, "lora"]
    model = llama(*methods, attention=attention)
    inputs = batch(len(names), padded=False)
    for i in range(len(names)):  # padded on the left
        inputs["attention_mask"][i, : i % 3] = 0
    for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}):
        options = {"max_new_tokens": 5, "do_sample": False, **options}
        want = one_by_one(model, names, lambda i: model.generate(**row(inputs, i), **options))  # noqa: B023
        beams = options.get("num_beams", 1)
        with lp.rows(model, names, repeats=beams):
            got = model.generate(**inputs, **options)
        assert torch.equal(got, torch.cat(want)), options
        if beams > 1:
            with lp.rows(model, names), pytest.raises(lp.RowError, match=f"repeats={beams} if each name stands for"):
                model.generate(**inputs, **options)


@torch.no_grad()
def test_a_cache_that_is_carried_on_by_hand():
    names = ["prompt", None, "lora", "prefix"]
    model, inputs = llama("prompt", "lora", "prefix"), batch(4, padded=False)["input_ids"]
    with lp.rows(model, names):
        want = model(inputs).logits[:, -1]
        first = model(inputs[:, :5])
        close(model(inputs[:, 5:], past_key_values=first.past_key_values).logits[:, -1], want)
    first = model(inputs[:, :5])
    with (
        lp.rows(model, names),
        pytest.raises(RuntimeError, match="KV cache that was filled with the virtual tokens of other adapters"),
    ):
        model(inputs[:, 5:], past_key_values=first.past_key_values)


# rows of different adapters are refused where another module reads a weight: tests/core/test_reads.py
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("embedding", "reads")])
@pytest.mark.parametrize("pair", [("lora", "lora_rs"), ("lora_pissa", "dora"), ("vera", "loha"), ("lokr", "oft")])
@torch.no_grad()
def test_every_layer_kind(kind, pair):
    model, inputs = KINDS[kind].build().eval(), KINDS[kind].batch()
    for name in pair:
        lp.apply(model, METHODS[name].make(KINDS[kind], name=name))
    perturb(model)
    dim = 1 if kind == "mha" else 0
    names = [pair[1], None, pair[0], pair[1]][: inputs[0].shape[dim]]
    want = one_by_one(model, names, lambda i: model(*(x.narrow(dim, i, 1) for x in inputs)))
    with lp.rows(model, names):
        close(model(*inputs), torch.cat(want, dim))


@torch.no_grad()
def test_several_adapters_in_one_row_run_in_the_order_of_the_model():
    methods = ["ssf", "lora", "rslora", "dora", "prefix", "gated", "parallel"]
    model, inputs = llama(*methods), batch(6)
    names = [("rslora", "ssf"), ("lora", "rslora"), "lora", ("lora", "dora"), ("gated", "prefix", "parallel"), ()]
    want = torch.cat(one_by_one(model, names, lambda i: model(**row(inputs, i)).logits))
    with lp.rows(model, names):
        got = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    close(got[seen], want[seen])


def test_gradients_are_those_of_separate_passes():
    methods = ["lora", "rslora", "adalora", "dora", "ia3", "parallel", "prefix", "prompt", "ptuning", "loha"]
    names = [*methods, None, "lora", "prompt"]
    model, inputs = llama(*methods).double(), batch(len(names))
    weight = torch.randn(len(names), 7, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weight = weight * inputs["attention_mask"][..., None]
    separate = one_by_one(model, names, lambda i: (model(**row(inputs, i)).logits * weight[i]).sum())
    sum(separate).backward()
    want = {k: p.grad.clone() for k, p in adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    with lp.rows(model, names):
        (model(**inputs).logits * weight).sum().backward()
    got = {k: p.grad for k, p in adapter_parameters(model).items() if p.grad is not None}
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-7, msg=key)


def test_labels_of_a_causal_model():
    names = ["prompt", None, "lora"]
    model, inputs = llama("prompt", "lora"), batch(3, padded=False)
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100  # so that every row has the same number of labels
    want = one_by_one(model, names, lambda i: model(**row(inputs, i), labels=labels[i : i + 1]).loss)
    with lp.rows(model, names):
        out = model(**inputs, labels=labels)
    close(out.loss, torch.stack(want).mean())
    assert out.logits.shape == (3, 7, 29)


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing(inside):
    names, other = ["lora", None, "dora", "prefix"], ["dora", "lora", "lora", None]
    model, inputs = llama("lora", "dora", "prefix"), batch(4)

    def gradients(reentrant: bool | None) -> dict[str, Tensor]:
        model.zero_grad()
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with lp.rows(model, names):
            first = model(**inputs, use_cache=False).logits.square().mean()
            if inside:
                first.backward()
        if not inside:  # backward runs both forwards again, after another context and a plain forward
            with lp.rows(model, other):
                second = model(**inputs, use_cache=False).logits.square().mean()
            lp.set_active(model, "lora")
            plain = model(**inputs, use_cache=False).logits.square().mean()
            (first + 2 * second + 3 * plain).backward()
        return {k: p.grad.clone() for k, p in adapter_parameters(model).items() if p.grad is not None}

    want, got = gradients(None), gradients(False)
    assert want.keys() == got.keys()
    for key in want:
        close(got[key], want[key])
    if inside:
        again = gradients(True)
        for key in want:
            close(again[key], want[key])


def test_reentrant_checkpointing_with_backward_outside_is_refused():
    model, x = two_loras(), torch.randn(4, 6, requires_grad=True)
    with lp.rows(model, ["a", "b", None, "a"]):
        loss = checkpoint(model, x, use_reentrant=True).sum()
    with pytest.raises(lp.RowError, match="use_reentrant=False"):
        loss.backward()


def test_compile():
    model, x = two_loras(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="eager")
    for names in (["a", "b", None, "a"], ["b", "b", "a", None], ["a"] * 4):
        want = torch.cat(one_by_one(model, names, lambda i: model(x[i : i + 1])))
        with lp.rows(model, names):
            close(compiled(x), want)
    close(compiled(x), model(x))


def test_dropout_is_drawn_for_each_row():
    model = MLP()
    for name, rate in (("a", 0.5), ("b", 0.0), ("c", 0.9)):
        lp.apply(model, lp.LoRA(r=2, dropout=rate, name=name))
    perturb(model).train()
    x = torch.randn(1, 6).expand(6, 6)
    with lp.rows(model, ["a", "a", "a", "a", "b", "b"]):
        y = model(x)
    assert len({tuple(r.tolist()) for r in y[:4].detach()}) > 1
    close(y[4], y[5])
    with lp.rows(model, ["c", "a", "b", "b", "a", "c"]):
        model(x).sum().backward()
    assert model.up.adapters["c"].lora_A.grad is not None


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_visual_prompts(deep, tokens_first):
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=not tokens_first)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()
    for name, tokens in (("a", 3), ("b", 5)):
        lp.apply(model, lp.VisualPromptTuning(tokens, deep=deep, leading_tokens=1, name=name))
    lp.apply(model, lp.LoRA(r=2, name="c", targets=["linear1", "0"]))
    perturb(model)
    dim = 1 if tokens_first else 0
    x = torch.randn(5, 7, 8).movedim(0, dim)
    names = ["a", "b", None, "c", ("a", "c")]
    want = one_by_one(model, names, lambda i: model(x.narrow(dim, i, 1)))
    with lp.rows(model, names):
        close(model(x), torch.cat(want, dim))
    assert type(lp.unload(model)[1]) is nn.TransformerEncoder


@torch.no_grad()
def test_visual_prompts_of_a_vision_transformer():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    lp.apply(model, lp.VisualPromptTuning(3, name="a"))
    lp.apply(model, lp.VisualPromptTuning(2, deep=True, name="b"))
    lp.apply(model, lp.SSF(name="c"))
    perturb(model).eval()
    x = torch.randn(4, 3, 16, 16)
    names = ["b", "c", None, "a"]
    want = one_by_one(model, names, lambda i: model(x[i : i + 1]).logits)
    with lp.rows(model, names):
        close(model(x).logits, torch.cat(want))


@torch.no_grad()
def test_an_encoder():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=29, num_labels=3, **sizes))
    names = ["prompt", None, "ptuning", "prefix", "lora", "oft", "serial"]
    for name in filter(None, names):
        lp.apply(model, MIXED[name](name))
    perturb(model).eval()
    inputs = batch(len(names))
    want = one_by_one(model, names, lambda i: model(**row(inputs, i)).logits)
    with lp.rows(model, names):
        close(model(**inputs).logits, torch.cat(want))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@torch.no_grad()
def test_an_encoder_decoder(side):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=29, decoder_start_token_id=0, **sizes))
    lp.apply(model, lp.PromptTuning(3, side=side, name="prompt"))
    lp.apply(model, lp.PromptTuning(2, side=side, name="short"))
    lp.apply(model, lp.PrefixTuning(2, targets=["SelfAttention", "EncDecAttention"], name="prefix"))
    lp.apply(model, lp.LoRA(r=2, name="lora"))
    perturb(model).eval()
    names = ["prompt", None, "prefix", "short", "lora"]
    inputs = {**batch(5), "decoder_input_ids": torch.randint(1, 29, (5, 4))}
    want = one_by_one(model, names, lambda i: model(**row(inputs, i), use_cache=False).logits)
    with lp.rows(model, names):
        close(model(**inputs, use_cache=False).logits, torch.cat(want))
        if side == "encoder":
            without = {k: v for k, v in inputs.items() if k != "attention_mask"}
            shape = model(**without, use_cache=False).encoder_last_hidden_state.shape
            assert shape == (5, 7, 16)
    given, options = batch(5), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    if side == "encoder":
        for beams in (1, 2):  # the encoder runs before the rows are repeated
            options["num_beams"] = beams
            want = one_by_one(model, names, lambda i: model.generate(**row(given, i), **options))
            with lp.rows(model, names, repeats=beams):
                assert torch.equal(model.generate(**given, **options), torch.cat(want))


class OwnBlocks(nn.Module):
    """Keeps its blocks in a list and is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers

    def step(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
