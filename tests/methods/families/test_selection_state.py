"""Selection methods: saved state, precision and errors."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.methods.families.test_selection import METHODS, Module, bert, llama, mlp, trained, trainer


class TestState:
    @pytest.mark.parametrize("method", METHODS)
    def test_only_what_trains_is_stored(self, method):
        method = copy.deepcopy(METHODS[method])
        method.trainable = ["4"] if method.trainable else []
        model = mlp()
        lp.apply(model, method)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(lp.trainable_parameters(model), lr=0.1, weight_decay=0.5)
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        state = lp.adapter_state(model)
        assert state.keys() == trained(model)
        other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert lp.adapter_state(other).keys() == state.keys()
        x = torch.randn(2, 3)
        with lp.disabled(model):
            assert torch.equal(model(x), other(x))
        lp.unload(model)
        assert all(p.requires_grad for p in model.parameters())
        assert type(model) is nn.Sequential

    def test_the_fingerprint_is_of_what_stays_frozen(self):
        for method, frozen in [
            (lp.FullFineTuning(), set()),
            (lp.LinearProbe(), {"0", "2"}),
            (lp.GradualUnfreezing(), set()),
            (lp.GradualUnfreezing(schedule=[3]), {"0"}),
        ]:
            model = mlp()
            lp.apply(model, method)
            values = model.__dict__["_peft_injection"].fingerprint["values"]
            assert {n.partition(".")[0] for n in values} == frozen

    @pytest.mark.parametrize("method", METHODS)
    def test_exact_resume_and_reload(self, method, tmp_path):
        def run(**options):
            L.seed_everything(3, verbose=False)
            module = Module()
            saving = L.pytorch.callbacks.ModelCheckpoint(
                tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
            )
            t = trainer([copy.deepcopy(METHODS[method]), saving], max_epochs=3, enable_checkpointing=True)
            t.fit(module, **options)
            return module, t

        whole, t = run()
        size = []
        for step in (3, 4, 6, 10):
            stored = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
            size.append(len(stored["state_dict"]))
            other, u = run(ckpt_path=tmp_path / f"step={step}.ckpt")
            for (n, p), (_, q) in zip(whole.named_parameters(), other.named_parameters()):
                assert torch.equal(p, q), (step, n)
                assert p.requires_grad == q.requires_grad
            a, b = t.optimizers[0].state_dict(), u.optimizers[0].state_dict()
            assert a["param_groups"] == b["param_groups"]
            assert a["state"].keys() == b["state"].keys()
            for i, state in a["state"].items():
                assert all(torch.equal(v, b["state"][i][k]) for k, v in state.items())
            again = lp.load_from_checkpoint(Module, tmp_path / f"step={step}.ckpt")
            assert lp.adapter_state(again).keys() == stored["state_dict"].keys()
        assert size == ([2, 2, 4, 6] if method == "gradual" else [size[0]] * 4)

    def test_another_base_is_an_error(self, tmp_path):
        t = trainer(lp.LinearProbe(), max_epochs=1)
        t.fit(Module())
        t.save_checkpoint(tmp_path / "x.ckpt")
        other = Module()
        nn.init.normal_(other.net[0].weight, 3.0)
        with pytest.raises(lp.StateError, match="different base model"):
            trainer(lp.LinearProbe()).fit(other, ckpt_path=tmp_path / "x.ckpt")


class TestPrecision:
    def test_modules_that_train_stay_in_float32(self):
        model = llama().to(torch.bfloat16)
        lp.apply(model, lp.NormTuning())
        assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
        tokens = torch.arange(6).view(1, 6)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(p.grad.isfinite().all() for p in lp.trainable_parameters(model))

    def test_training_in_bfloat16_warns_of_lost_updates(self):
        with pytest.warns(UserWarning, match="small updates are rounded away"):
            trainer(lp.FullFineTuning(), precision="bf16-true", max_steps=1).fit(Module())


class TestErrors:
    def test_arguments(self):
        with pytest.raises(ValueError, match=r"layer_decay must be a factor in \(0, 1\], got 0"):
            lp.FullFineTuning(layer_decay=0)
        with pytest.raises(ValueError, match="n must be an integer of at least 1"):
            lp.LastLayers(n=0)
        with pytest.raises(ValueError, match="parts must be one of 'all', 'weight', 'bias'"):
            lp.NormTuning(parts="scale")

    @pytest.mark.parametrize(
        ("build", "method", "message"),
        [
            (bert, lp.LastLayers(n=4), r"n=4, but BertForSequenceClassification has 3 blocks \(bert.encoder.layer.0"),
            (bert, lp.LastLayers(targets="encoder.layers.*"), r"'encoder.layers.\*' matches nothing; nearest: "),
            (bert, lp.LastLayers(targets=["encoder", "query"]), "is inside 'bert.encoder'"),
            (bert, lp.FullFineTuning(exclude=["bert", "classifier"]), "excludes everything that would train"),
            (bert, lp.BitFit(targets="word_embeddings"), "names no parameter that BitFit trains"),
            (bert, lp.BitFit(exclude=["bert", "classifier"]), "excludes everything that targets='all' matches"),
            (bert, lp.NormTuning(targets="query"), "names no parameter that NormTuning trains; nearest"),
            (llama, lp.BitFit(), "finds no bias in LlamaForCausalLM"),
            (bert, lp.BitFit("classifier", trainable=["classifier"]), "finds no bias in .* but in trainable"),
            (llama, lp.NormTuning(parts="bias"), "no norm layer of LlamaForCausalLM has a bias"),
            (mlp, lp.NormTuning(), "finds no norm layer with parameters in Sequential"),
            (lambda: nn.LSTM(2, 2), lp.LinearProbe(), "LinearProbe finds no output head in LSTM"),
            (
                bert,
                lp.LinearProbe(trainable="clasifier"),
                "'clasifier' matches nothing; nearest: classifier",
            ),
        ],
    )
    def test_what_does_not_fit(self, build, method, message):
        model = build()
        before = trained(model)
        with pytest.raises(lp.TargetError, match=message):
            lp.apply(model, method)
        assert trained(model) == before

    def test_quantised_weights(self):
        model = mlp()
        model[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
        with pytest.raises(lp.TargetError, match=r"0.weight cannot train because it is quantised \(torch.int8\)"):
            lp.apply(model, lp.FullFineTuning())
