from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapters.virtual_tokens import TokenTemplate
from lightning_peft.methods.families.prompt_adapters import PromptAdapter, TokenError
from tests.methods.tiny import Block, Classifier, bert, gpt2, llama, randomise, t5, trainer

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 7, dtype=torch.long)
LEFT[1, :3] = 0
RIGHT = LEFT.flip(1)
PLACES = [{"position": "prefix"}, {"position": "after_bos"}, {"position": "suffix"}, {"template": "v1 x1 v2 x* v1"}]


def prompt_of(model) -> PromptAdapter:
    return next(m for m in model.modules() if isinstance(m, PromptAdapter))


def manual(words: str, row: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The longer row by hand, and where the real tokens are in it."""
    fixed = sum(int(w[1:]) for w in words.split() if w[0] == "x" and w != "x*")
    parts, keep, real, virtual, at = [], [], 0, 0, 0
    for word in words.split():
        count = len(row) - fixed if word == "x*" else int(word[1:])
        if word[0] == "v":
            parts.append(prompt[virtual : virtual + count])
            virtual += count
        else:
            parts.append(row[real : real + count])
            keep += range(at, at + count)
            real += count
        at += count
    return torch.cat(parts), keep


WORDS = {"prefix": "v4 x*", "after_bos": "x1 v4 x*", "suffix": "x* v4"}


def words(place):
    return place.get("template") or WORDS[place["position"]]


# --- against Hugging Face PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_outputs_and_gradients_equal_pefts(kind):
    import peft

    make, task = {"llama": (llama, "CAUSAL_LM"), "gpt2": (gpt2, "CAUSAL_LM"), "bert": (bert, "SEQ_CLS")}[kind]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make(torch.float64), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4))
    theirs = theirs.double().eval()
    ours = make(torch.float64)
    lp.apply(ours, lp.PromptTuning(4, adapter_dtype="float64"))
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        prompt_of(ours).prompt.copy_(table)
    for mask in (None, RIGHT):
        ours.zero_grad()
        theirs.zero_grad()
        labels = torch.tensor([0, 2]) if kind == "bert" else IDS
        a = ours(input_ids=IDS, attention_mask=mask, labels=labels)
        b = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS) if mask is None else mask, labels=labels)
        torch.testing.assert_close(a.loss, b.loss)
        if kind == "bert":
            torch.testing.assert_close(a.logits, b.logits)
        else:
            torch.testing.assert_close(a.logits, b.logits[:, 4:])
        a.loss.backward()
        b.loss.backward()
        torch.testing.assert_close(prompt_of(ours).prompt.grad, table.grad)


def test_initialisation_from_text_labels_and_vocabulary(tmp_path):
    from transformers import BertTokenizerFast

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "is", "it"]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path / "tok")
    source = str(tmp_path / "tok")
    model = bert()
    lp.apply(model, lp.PromptTuning(5, init="text", init_text="is it good", tokenizer=source))
    table = model.get_input_embeddings().weight
    got = prompt_of(model).prompt
    assert torch.equal(got, table[[7, 8, 5, 7, 8]])
    model = bert()
    lp.apply(model, lp.PromptTuning(3, init="labels", init_text=["good", "is bad"], tokenizer=source))
    torch.testing.assert_close(prompt_of(model).prompt[:2], torch.stack([table[5], (table[7] + table[6]) / 2]))
    with pytest.raises(ValueError, match="has 2 class names, but there are only 1 virtual tokens"):
        lp.apply(bert(), lp.PromptTuning(1, init="labels", init_text=["good", "bad"], tokenizer=source))
    model = bert()
    lp.apply(model, lp.PromptTuning(6))
    assert all((table == row).all(1).any() for row in prompt_of(model).prompt)


# --- against the model fed by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES, ids=words)
@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_virtual_tokens_stand_where_they_should(make, place, padding):
    mask = {"none": None, "left": LEFT, "right": RIGHT}[padding]
    causal = make is not bert
    base = make() if causal else bert(head="TokenClassification")
    model = copy.deepcopy(base)
    lp.apply(model, lp.PromptTuning(None if "template" in place else 4, **place))
    randomise(model, 0.5)
    prompt = prompt_of(model).prompt
    positions = None
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    assert out.shape[:2] == IDS.shape
    for i in range(2):  # each row by itself, without padding: what stands where does not depend on it
        real = IDS[i] if mask is None else IDS[i][mask[i].bool()]
        long, keep = manual(words(place), base.get_input_embeddings()(real), prompt)
        expected = base(inputs_embeds=long[None]).logits[0]
        got = out[i] if mask is None else out[i][mask[i].bool()]
        if causal:
            keep = [*(k - 1 for k in keep[1:]), len(long) - 1]  # the position before the next real token
        torch.testing.assert_close(got, expected[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES, ids=words)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_loss_is_that_of_the_longer_sequence(make, place):
    base = make()
    model = copy.deepcopy(base)
    lp.apply(model, lp.PromptTuning(None if "template" in place else 4, **place))
    randomise(model, 0.5)
    labels = IDS.clone()
    labels[:, 2] = -100
    out = model(input_ids=IDS, labels=labels)
    embeds, longer = [], []
    for i in range(2):
        row, keep = manual(words(place), base.get_input_embeddings()(IDS[i]), prompt_of(model).prompt)
        wide = torch.full((len(row),), -100)
        wide[keep] = labels[i]
        embeds.append(row)
        longer.append(wide)
    torch.testing.assert_close(out.loss, base(inputs_embeds=torch.stack(embeds), labels=torch.stack(longer)).loss)
    assert out.logits.shape[:2] == IDS.shape
    torch.testing.assert_close(out.logits, model(input_ids=IDS).logits)
    torch.testing.assert_close(model(input_ids=IDS, labels=labels, return_dict=False)[1], out.logits)
    if not words(place).startswith("v"):  # no virtual token before the first real one
        by_hand = F.cross_entropy(out.logits[:, :-1].reshape(-1, 100), labels[:, 1:].reshape(-1))
        torch.testing.assert_close(by_hand, out.loss)


def test_a_classifier_that_pools_by_padding_still_finds_the_last_token():
    base = gpt2(head="SequenceClassification")
    model = copy.deepcopy(base)
    lp.apply(model, lp.PromptTuning(4))
    randomise(model, 0.5)
    ids = IDS.masked_fill(RIGHT == 0, 0)
    both = model(input_ids=ids, attention_mask=RIGHT).logits
    torch.testing.assert_close(model(input_ids=ids[1:, :4]).logits, both[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES, ids=words)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generates_with_a_cache(make, place):
    base = make()
    model = copy.deepcopy(base)
    lp.apply(model, lp.PromptTuning(None if "template" in place else 4, **place))
    randomise(model, 0.5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(IDS, attention_mask=LEFT, **options)
    for i in range(2):
        real = IDS[i][LEFT[i].bool()]
        long, _ = manual(words(place), base.get_input_embeddings()(real), prompt_of(model).prompt)
        for token in made[i, 7:]:
            assert base(inputs_embeds=long[None]).logits[0, -1].argmax() == token
            long = torch.cat([long, base.get_input_embeddings()(token[None])])
    assert model.generate(IDS, attention_mask=LEFT, num_beams=2, **options).shape == (2, 12)
    if not words(place).endswith(("v1", "v4")):
        assert torch.equal(made, model.generate(IDS, attention_mask=LEFT, use_cache=False, **options))


def test_hidden_states_and_attentions_keep_their_lengths():
    for impl, make in (("eager", llama), ("eager", bert)):
        model = make()
        model.set_attn_implementation(impl)
        lp.apply(model, lp.PromptTuning(4))
        out = model(IDS, output_hidden_states=True, output_attentions=True)
        assert all(h.shape == (2, 7, 32) for h in out.hidden_states)
        assert all(a.shape[-2:] == (7, 7) for a in out.attentions)
        assert len(out.hidden_states) == 4
    labelled = llama()
    lp.apply(labelled, lp.PromptTuning(4))
    out = labelled(IDS, labels=IDS, output_hidden_states=True)
    assert all(h.shape == (2, 7, 32) for h in out.hidden_states)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_encoder_decoder(side):
    base = t5()
    model = copy.deepcopy(base)
    report = lp.apply(model, lp.PromptTuning(4, side=side))
    assert report.trainable == 4 * 32
    randomise(model, 0.5)
    labels = IDS[:, :3].contiguous()
    out = model(input_ids=IDS, attention_mask=LEFT, labels=labels, output_hidden_states=True)
    assert out.encoder_last_hidden_state.shape == (2, 7, 32)
    assert all(h.shape == (2, 7, 32) for h in out.encoder_hidden_states)
    assert out.logits.shape == (2, 3, 100)
    prompt, table = prompt_of(model).prompt, base.shared
    for i in range(2):
        real = IDS[i][LEFT[i].bool()]
        row = torch.cat([prompt, table(real)])[None] if side == "encoder" else table(real)[None]
        decoder = torch.cat([torch.zeros(1, dtype=torch.long), labels[i, :-1]])[None]
        start = table(decoder)
        if side == "decoder":
            start = torch.cat([prompt[None], start], 1)
        expected = base(inputs_embeds=row, decoder_inputs_embeds=start).logits[0, -3:]
        torch.testing.assert_close(out.logits[i], expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": LEFT}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))
    with lp.disabled(model):
        torch.testing.assert_close(
            model(input_ids=IDS, labels=labels).logits, base(input_ids=IDS, labels=labels).logits
        )


def test_embeddings_token_types_and_tuples_as_inputs():
    model = bert()
    lp.apply(model, lp.PromptTuning(4))
    randomise(model, 0.5)
    out = model(IDS).logits
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, out)
    torch.testing.assert_close(model(IDS, None, torch.zeros_like(IDS)).logits, out)
    torch.testing.assert_close(model(IDS, return_dict=False)[0], out)
    assert not torch.allclose(model(IDS, token_type_ids=torch.ones_like(IDS)).logits, out)


# --- modules that are not Hugging Face's ----------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES, ids=words)
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformer(place, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, dropout=0.0)
    model = nn.ModuleDict({"emb": nn.Embedding(9, 16), "body": nn.TransformerEncoder(layer, 2).eval()})
    base = copy.deepcopy(model["body"])
    options = {} if "template" in place else {"num_virtual_tokens": 4}
    lp.apply(model, lp.PromptTuning(targets="body", **options, **place))
    x = torch.randn(2, 7, 16)
    both = [manual(words(place), row, prompt_of(model).prompt) for row in x]
    swap = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    got = swap(model["body"](swap(x)))
    expected = swap(base(swap(torch.stack([row for row, _ in both]))))[:, both[0][1]]
    torch.testing.assert_close(got, expected)
    drop = torch.zeros(2, 7, dtype=torch.bool)
    drop[1, 5:] = True
    padded = swap(model["body"](swap(x), src_key_padding_mask=drop))
    assert padded.shape == (2, 7, 16)


def test_a_causal_mask_stays_causal():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    for place in PLACES:
        model = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2).eval()})
        options = {} if "template" in place else {"num_virtual_tokens": 4}
        lp.apply(model, lp.PromptTuning(targets="body", init="random", **options, **place))
        x = torch.randn(1, 7, 16)
        for mask in (torch.ones(7, 7, dtype=torch.bool).triu(1), nn.Transformer.generate_square_subsequent_mask(7)):
            x.requires_grad_()
            out = model["body"](x, mask=mask, is_causal=True)
            for i in range(7):
                (grad,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
                assert not grad[0, i + 1 :].any()
            grad = torch.autograd.grad(out[0, -1].square().sum(), prompt_of(model).prompt, retain_graph=True)[0]
            assert grad.any() or place.get("position") == "suffix"


# --- the family's contract -------------------------------------------------------------------------------------


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
    """Qwen2-VL's positions are (axes, batch, length); a text with a prompt has those of the longer text."""
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
