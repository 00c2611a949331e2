"""Prompt tuning as a method: counts, composition, resume, and its errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapters.virtual_tokens import TokenTemplate
from lightning_peft.methods.families.prompt_adapters import TokenError
from tests.methods.test_prompt_tuning import IDS, RIGHT, prompt_of
from tests.methods.tiny import Block, Classifier, bert, gpt2, llama, t5, trainer


def test_count_merge_copies_and_unload():
    model = llama()
    base = model(IDS).logits
    assert lp.apply(model, lp.PromptTuning(6)).trainable == 6 * 32
    out = model(IDS, labels=IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IDS, labels=IDS).loss, out.loss, rtol=0, atol=0)
    fresh = llama()
    lp.apply(fresh, lp.PromptTuning(6, seed=9))
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    assert torch.equal(fresh(IDS).logits, out.logits)
    with pytest.raises(lp.MergeError, match=r"'default' at .*\(Prompt"):
        lp.merge(model)
    with lp.disabled(model):
        assert torch.equal(model(IDS).logits, base)
    lp.unload(model)
    assert torch.equal(model(IDS).logits, base)


def test_composes_with_lora_prefixes_and_an_unfrozen_block():
    outs = []
    for order in (1, -1):
        model = llama()
        methods = [
            lp.PromptTuning(4, name="prompt", trainable="layers.2"),
            lp.LoRA(r=2, targets="q_proj", exclude="layers.2"),
            lp.PrefixTuning(3, name="prefix"),
            lp.PromptTuning(2, name="second", position="suffix"),
        ]
        lp.apply(model, *(methods if order == 1 else [methods[2], methods[1], methods[0], methods[3]]))
        for name, p in model.named_parameters():
            if ".adapters." in name:
                g = torch.Generator().manual_seed(len(name))
                p.data = torch.randn(p.shape, generator=g) * 0.3
        out = model(IDS, labels=IDS)
        out.loss.backward()
        assert all(p.grad is not None for p in lp.trainable_parameters(model))
        outs.append(out)
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    assert outs[0].logits.shape == (2, 7, 100)


@pytest.mark.parametrize("make", [llama, bert])
def test_compile_and_gradient_checkpointing(make):
    model = make()
    lp.apply(model, lp.PromptTuning(4, position="after_bos"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for m in model.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.0
            model.train()
        model.zero_grad()
        model(IDS).logits.square().mean().backward()
        grads.append(prompt_of(model).prompt.grad.clone())
    torch.testing.assert_close(*grads)


def test_half_precision_base():
    model = llama().bfloat16()
    lp.apply(model, lp.PromptTuning(4))
    out = model(IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert prompt_of(model).prompt.grad.dtype == torch.float32


def test_fit_and_resume_bit_for_bit(tmp_path):
    def method():
        return lp.PromptTuning(4, targets="body", trainable="head", seed=1)

    whole = Classifier()
    trainer(tmp_path / "a", method(), epochs=2).fit(whole)
    first = trainer(tmp_path / "b", method(), epochs=1)
    first.fit(Classifier())
    first.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == ["body.adapters.default.prompt", "head.bias", "head.weight"]
    rest = Classifier()
    trainer(tmp_path / "c", method(), epochs=2).fit(rest, ckpt_path=tmp_path / "one.ckpt")
    for key, value in lp.adapter_state(whole).items():
        assert torch.equal(lp.adapter_state(rest)[key], value), key


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer of at least 1"),
        ({"position": "middle"}, "position must be one of 'prefix', 'after_bos', 'suffix'"),
        ({"side": "left"}, "side must be one of"),
        ({"template": "v3"}, r"x\* once"),
        ({"template": "a3 x*"}, "write v<number>"),
        ({"template": "x*"}, "has no virtual token"),
        ({"num_virtual_tokens": 3, "template": "v4 x*"}, "remove num_virtual_tokens"),
        ({"init": "text"}, "init_text must be a string"),
        ({"init": "text", "init_text": "a"}, "needs a tokenizer"),
        ({"init": "labels", "init_text": "a", "tokenizer": "t"}, "a list of class names"),
        ({"init_text": "a"}, "init_text has no effect with"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.PromptTuning(**arguments)


def test_bad_targets():
    with pytest.raises(lp.TargetError, match=r"finds no module that takes inputs_embeds.* Name in targets"):
        lp.apply(nn.Sequential(nn.Linear(4, 4)), lp.PromptTuning())
    with pytest.raises(lp.TargetError, match=r"leave no room for text: 'transformer' \(GPT2Model\) has 64 positions"):
        lp.apply(gpt2(), lp.PromptTuning(64))
    with pytest.raises(lp.TargetError, match="a prompt is inserted into a single module: name one"):
        lp.apply(nn.Sequential(Block(), Block()), lp.PromptTuning(targets="type:Block"))
    with pytest.raises(lp.TargetError, match="set init='random'"):
        lp.apply(nn.ModuleDict({"b": Block()}), lp.PromptTuning(targets="b"))
    with pytest.raises(lp.TargetError, match="'bodi' matches nothing; nearest: body"):
        lp.apply(Classifier(), lp.PromptTuning(targets="bodi"))
    with pytest.raises(lp.TargetError, match="several modules that take tokens"):
        lp.apply(nn.ModuleDict({"a": llama(), "b": llama()}), lp.PromptTuning())


def test_calls_that_cannot_take_a_prompt():
    model = gpt2()
    lp.apply(model, lp.PromptTuning(10))
    with pytest.raises(TokenError, match="truncate inputs to 54"):
        model(torch.ones(1, 60, dtype=torch.long))
    model = llama()
    lp.apply(model, lp.PromptTuning(4))
    with pytest.raises(TokenError, match="attention mask that is not"):
        model(IDS, attention_mask=torch.zeros(2, 1, 7, 7))
    body = nn.ModuleDict({"b": nn.Linear(16, 16)})
    lp.apply(body, lp.PromptTuning(4, targets="b", init="random"))
    with pytest.raises(TokenError, match=r"needs embeddings \(batch, length, width\)"):
        body["b"](torch.randn(3, 16))


def test_placement_in_rows_too_short_for_the_template():
    layout = TokenTemplate.parse("x3 v1 x* v1 x2").layout(1, 4, torch.tensor([[0, 0, 1, 0]]), torch.device("cpu"))
    assert layout.insert(torch.arange(4.0)[None], torch.tensor([8.0, 9.0])).tolist() == [[0, 1, 2, 8, 9, 3]]


def test_rotary_positions_of_several_axes():
    """Qwen2-VL's position ids are (axes, batch, length); a text with a prompt has those of a longer text."""
    import transformers

    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text |= {"num_key_value_heads": 2, "vocab_size": 100, "rope_parameters": rope, "pad_token_id": 0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    base = copy.deepcopy(model)
    lp.apply(model, lp.PromptTuning(4, targets="language_model"))
    embeds = torch.cat([prompt_of(model).prompt.expand(2, -1, -1), base.get_input_embeddings()(IDS)], 1)
    positions = torch.arange(7).expand(3, 2, -1)
    got = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
    wanted = base(inputs_embeds=embeds, position_ids=torch.arange(11).expand(3, 2, -1), use_cache=False).logits
    torch.testing.assert_close(got, wanted[:, 4:])
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, wanted[:, 4:])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "answers"])
def test_a_named_model_with_a_head_gets_its_prompt_inside(kind):
    """Labels and positions of the caller fit, and loss and logits equal those of PEFT, which wraps the whole model."""
    import peft
    import transformers

    def answers(dtype):
        torch.manual_seed(0)
        options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return (
            transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=100, **options)).to(dtype).eval()
        )

    task = {"t5": "SEQ_2_SEQ_LM", "answers": None}.get(kind, "CAUSAL_LM")
    model = {"llama": llama, "gpt2": gpt2, "t5": t5, "answers": answers}[kind](torch.float64)
    outer = nn.ModuleDict({"side": nn.Linear(2, 2), "lm": copy.deepcopy(model)})
    lp.apply(outer, lp.PromptTuning(4, targets=["lm"]))
    prompt = prompt_of(outer).prompt
    batch = {"input_ids": IDS, "attention_mask": RIGHT}
    labels = {"start_positions": IDS[:, 0] % 3, "end_positions": IDS[:, 1] % 3} if task is None else {"labels": IDS}
    got = outer["lm"](**batch, **labels)
    if task is None:  # PEFT does not move the positions of answers
        embeds = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        logits = model(inputs_embeds=embeds, attention_mask=F.pad(RIGHT, (4, 0), value=1)).start_logits[:, 4:]
        torch.testing.assert_close(got.start_logits, logits)
        return
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    theirs.prompt_encoder["default"].embedding.weight.data[:4] = prompt.detach()
    wanted = theirs(**batch, **labels)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.logits, wanted.logits[:, -7:])


class Forecaster(nn.Module):
    """An encoder-decoder that makes the decoder's input itself, as Chronos-Bolt does."""

    def __init__(self):
        super().__init__()
        model = t5()
        self.shared, self.encoder, self.decoder = model.shared, model.encoder, model.decoder

    def forward(self, context, mask=None):
        states = self.encoder(inputs_embeds=self.shared(context), attention_mask=mask)[0]
        start = torch.zeros(len(context), 1, dtype=torch.long)
        return self.decoder(input_ids=start, encoder_hidden_states=states, encoder_attention_mask=mask)[0]


def test_encoder_decoder_that_makes_its_decoder_input():
    model = Forecaster()
    base = copy.deepcopy(model)
    lp.apply(model, lp.PromptTuning(4))
    for mask in (None, RIGHT):
        embeds = torch.cat([prompt_of(model).prompt.expand(2, -1, -1), base.shared(IDS)], 1)
        wide = None if mask is None else torch.cat([torch.ones(2, 4, dtype=torch.long), mask], 1)
        states = base.encoder(inputs_embeds=embeds, attention_mask=wide)[0]
        start = torch.zeros(2, 1, dtype=torch.long)
        wanted = base.decoder(input_ids=start, encoder_hidden_states=states, encoder_attention_mask=wide)[0]
        torch.testing.assert_close(model(IDS, mask), wanted)
