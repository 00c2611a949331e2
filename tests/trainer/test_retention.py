"""``lp.Retention``: the divergence, checked against a copy of the base, for adapters and for bases that train."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.data import LanguageModelData, TextClassificationData
from lightning_peft.tasks import LanguageModel, TextClassifier

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=shuffle)


def trainer(*callbacks, steps: int = 4, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    given = {**quiet, "enable_model_summary": False, "max_steps": steps, "max_epochs": -1, **options}
    return L.Trainer(callbacks=list(callbacks), **given)


def expected(base: nn.Module, now: nn.Module) -> tuple[float, float]:
    with torch.no_grad():
        p, q = base.eval()(X).double().log_softmax(-1), now.eval()(X).double().log_softmax(-1)
    change = nn.functional.nll_loss(q, Y) - nn.functional.nll_loss(p, Y)
    return float((p.exp() * (p - q)).sum(-1).mean()), float(change)


METHODS = {
    "lora": lp.LoRA(r=2, targets="all-linear"),
    "lora and a head": lp.LoRA(r=2, targets=["body.0"], trainable=["body.4"]),
    "biases": lp.BitFit(),
    "everything": lp.FullFineTuning(),
    "no method": None,
}


@pytest.mark.parametrize("name", METHODS)
def test_the_divergence_is_that_from_a_copy_of_the_base(name):
    module = Classifier()
    base, method = copy.deepcopy(module), copy.deepcopy(METHODS[name])
    retention = lp.Retention(loader())
    fit = trainer(*([method] if method else []), retention)
    fit.fit(module, loader(), loader())
    kl, change = expected(base, module)
    assert kl > 1e-4
    assert retention.last["kl"] == pytest.approx(kl, rel=1e-4)
    assert retention.last["loss_change"] == pytest.approx(change, rel=1e-3)
    assert float(fit.callback_metrics["retention/kl"]) == pytest.approx(kl, rel=1)  # the value of an earlier validation
    assert (retention._kept is None) == (name == "lora")


def test_measuring_does_not_change_the_run():
    states = []
    for callbacks in ((), (lp.Retention(loader(shuffle=True)),)):
        L.seed_everything(0, verbose=False)
        module = Classifier()
        trainer(lp.LoRA(r=2, targets="all-linear"), *callbacks).fit(module, loader(shuffle=True), loader())
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_limit_stops_the_run():
    module = Classifier()
    fit = trainer(lp.LoRA(r=2, targets="all-linear"), lp.Retention(loader(), limit=1e-4), steps=50)
    with pytest.warns(UserWarning, match=r"retention/kl is .* above limit=0.0001, so the run stops"):
        fit.fit(module, loader(), loader())
    assert fit.global_step == 3


def test_a_resumed_run_measures_from_the_same_base():
    module = Classifier()
    base = copy.deepcopy(module)
    first = trainer(lp.BitFit(), lp.Retention(loader()), steps=3)
    first.fit(module, loader())
    first.save_checkpoint("a.ckpt")
    again, retention = copy.deepcopy(base), lp.Retention(loader())
    trainer(lp.BitFit(), retention, steps=6).fit(again, loader(), ckpt_path="a.ckpt")
    assert retention.last["kl"] == pytest.approx(expected(base, again)[0], rel=1e-4)


def test_a_causal_language_model_and_its_padding(gpt2):
    Path("texts.txt").write_text(
        "one short text\na text that is a good deal longer than the other\nthird\nfourth text\n"
    )
    data = LanguageModelData("texts.txt", validation="texts.txt", max_length=16, batch_size=2)
    retention = lp.Retention(LanguageModelData("texts.txt", validation="texts.txt", max_length=16, batch_size=2))
    module = LanguageModel(gpt2, lr=1e-1)
    trainer(lp.LoRA(r=2), retention, steps=2).fit(module, data)
    module.eval()
    sums, count = 0.0, 0
    for batch in retention._batches:
        with torch.no_grad(), lp.disabled(module):
            p = module(batch["input_ids"], batch["attention_mask"]).double().log_softmax(-1)
        with torch.no_grad():
            q = module(batch["input_ids"], batch["attention_mask"]).double().log_softmax(-1)
        mask = batch["attention_mask"] == 1
        assert not mask.all()
        sums, count = sums + float((p.exp() * (p - q)).sum(-1)[mask].sum()), count + int(mask.sum())
    assert retention.last["kl"] == pytest.approx(sums / count, rel=1e-3)
    assert retention.last["kl"] > 0
    assert "loss_change" in retention.last


def test_features_where_the_head_is_new():
    data = TextClassificationData("demo", max_length=16, batch_size=4)
    refused = trainer(lp.LoRA(r=2), lp.Retention(TextClassificationData("demo", max_length=16)), steps=1)
    with pytest.raises(MisconfigurationException, match="classifier has no pretrained weights"):
        refused.fit(TextClassifier("demo"), data)

    def features(module, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return module.model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    retention = lp.Retention(data, batches=1, distance="cosine", forward_fn=features)
    trainer(lp.LoRA(r=2), retention, steps=2, limit_val_batches=1).fit(TextClassifier("demo", lr=1e-2), data)
    assert 0 < retention.last["cosine"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batches": 0}, "must be at least 1"), ({"limit": 0}, "above 0"), ({"distance": "l2"}, "'kl' or 'cosine'")],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.Retention(loader(), **arguments)


def test_an_output_without_a_distribution_and_data_without_batches():
    for retention, message in (
        (lp.Retention(loader(), forward_fn=lambda module, batch: module(batch[0])[:, :1]), r"is \(8, 1\), but"),
        (lp.Retention([]), "data has no batches"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            trainer(lp.LoRA(r=2), retention).fit(Classifier(), loader())
