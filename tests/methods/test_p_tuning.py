from __future__ import annotations

import pytest
import torch

import lightning_peft as lp
from lightning_peft.methods.families.prompt_adapters import PromptAdapter
from tests.methods.tiny import Classifier, bert, gpt2, llama, randomise, t5, trainer

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(3))


def encoder_of(model):
    return next(m for m in model.modules() if isinstance(m, PromptAdapter)).encoder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_outputs_and_gradients_equal_pefts(kind, encoder):
    import peft

    make, task = {"llama": (llama, "CAUSAL_LM"), "gpt2": (gpt2, "CAUSAL_LM"), "bert": (bert, "SEQ_CLS")}[kind]
    torch.manual_seed(1)
    config = peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=4,
        encoder_hidden_size=6,
        encoder_reparameterization_type=encoder.upper(),
    )
    theirs = peft.get_peft_model(make(torch.float64), config).double().eval()
    source = theirs.prompt_encoder["default"]
    ours = make(torch.float64)
    lp.apply(ours, lp.PTuning(4, encoder=encoder, hidden_size=6, adapter_dtype="float64"))
    mine = encoder_of(ours)
    pairs = [(mine.embedding, source.embedding.weight)]
    pairs += list(zip(mine.mlp.parameters(), source.mlp_head.parameters()))
    if encoder == "lstm":
        pairs += list(zip(mine.lstm.parameters(), source.lstm_head.parameters()))
    assert len(pairs) == len(list(mine.parameters()))
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    labels = torch.tensor([0, 2]) if kind == "bert" else IDS
    a, b = (m(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels) for m in (ours, theirs))
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.logits, b.logits if kind == "bert" else b.logits[:, 4:])
    a.loss.backward()
    b.loss.backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad)


def test_counts_equal_the_formulas():
    d, h, t = 32, 6, 4
    mlp = t * d + (d * h + h) + (h * h + h) + (h * d + d)
    assert lp.apply(llama(), lp.PTuning(t, hidden_size=h)).trainable == mlp
    lstm = 2 * (4 * h * (d + h) + 8 * h) + 2 * (4 * h * (2 * h + h) + 8 * h)
    head = (4 * h * h + 2 * h) + (2 * h * d + d)
    assert lp.apply(llama(), lp.PTuning(t, hidden_size=h, encoder="lstm")).trainable == t * d + lstm + head


@pytest.mark.parametrize("make", [llama, bert, t5])
def test_fold_keeps_the_function_and_the_folded_state_loads(make):
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if make is t5 else {})
    model = make()
    method = lp.PTuning(template="v2 x1 v2 x*", hidden_size=6)
    lp.apply(model, method)
    before = model(**inputs).logits
    assert len(lp.fold(model)) == 1
    torch.testing.assert_close(model(**inputs).logits, before)
    (p,) = lp.trainable_parameters(model)
    assert p.shape == (4, 32)
    assert not method.folded_prompt
    fresh = make()
    lp.apply(fresh, method.without_reparameterization())
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    torch.testing.assert_close(fresh(**inputs).logits, before)


def test_generates_disables_and_composes():
    model = llama()
    base = model(IDS).logits
    lp.apply(model, lp.PTuning(4, name="p"), lp.LoRA(r=2))
    randomise(model, 0.3)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)
    with lp.active(model, "p"), pytest.raises(lp.MergeError, match="'p' at"):
        lp.merge(model)
    with lp.disabled(model):
        assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_fit_resume_and_fold_a_trained_module(tmp_path, encoder):
    def method():
        return lp.PTuning(
            4, targets="body", trainable="head", seed=1, encoder=encoder, dropout=0.5 * (encoder == "lstm")
        )

    whole = Classifier()
    trainer(tmp_path / "a", method(), epochs=2).fit(whole)
    first = trainer(tmp_path / "b", method(), epochs=1)
    first.fit(Classifier())
    first.save_checkpoint(tmp_path / "one.ckpt")
    assert "body.adapters.default.encoder.embedding" in torch.load(tmp_path / "one.ckpt")["state_dict"]
    rest = Classifier()
    trainer(tmp_path / "c", method(), epochs=2).fit(rest, ckpt_path=tmp_path / "one.ckpt")
    for key, value in lp.adapter_state(whole).items():
        assert torch.equal(lp.adapter_state(rest)[key], value), key
    ids = torch.randint(0, 20, (2, 6))
    before = rest.eval()(ids)
    lp.fold(rest)
    torch.testing.assert_close(rest(ids), before)


def test_a_checkpoint_of_a_folded_model_loads(tmp_path):
    model = Classifier()
    run = trainer(tmp_path, lp.PTuning(4, targets="body"), lp.PrefixTuning(3, bottleneck_size=5, name="prefix"))
    run.fit(model)
    assert len(lp.fold(model)) == 4
    run.save_checkpoint(tmp_path / "folded.ckpt", weights_only=True)
    loaded = lp.load_from_checkpoint(Classifier, tmp_path / "folded.ckpt")
    assert lp.adapter_state(loaded).keys() == lp.adapter_state(model).keys()
    ids = torch.randint(0, 20, (2, 6))
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "gru"}, "encoder must be one of 'mlp', 'lstm'"),
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"num_layers": 3}, "apply to the LSTM only: set encoder='lstm'"),
        ({"encoder": "lstm", "num_layers": 1, "dropout": 0.1}, "dropout acts between LSTM layers"),
        ({"dropout": 1.0}, "dropout must be a probability"),
        ({"template": "x*"}, "has no virtual token"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.PTuning(**arguments)
