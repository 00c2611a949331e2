from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.families.prompt_adapters import PromptAdapter
from tests.methods.tiny import bert, gpt2, llama, randomise, t5

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 7, dtype=torch.long)
LEFT[1, :3] = 0
RIGHT = LEFT.flip(1)
PLACES = [{"position": "prefix"}, {"position": "after_bos"}, {"position": "suffix"}, {"template": "v1 x1 v2 x* v1"}]


def prompt_of(model) -> PromptAdapter:
    return next(m for m in model.modules() if isinstance(m, PromptAdapter))


def manual(words: str, row: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The longer row, built by hand, and the positions of the real tokens in it."""
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
def test_virtual_tokens_are_at_their_positions(make, place, padding):
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
    for i in range(2):  # each row by itself, without padding, which must not change the positions
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
