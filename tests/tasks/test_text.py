"""TextClassifier: it learns, logs and predicts, and its errors are clear."""

import lightning as L
import pytest
import torch

from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassifier

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def batch(size=4, length=10, classes=17):
    return {
        "input_ids": torch.randint(5, 4096, (size, length)),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.arange(size) % classes,
    }


def test_demo_gives_logits_and_gradients_everywhere():
    module = TextClassifier("demo")
    example = batch()
    logits = module(example["input_ids"], example["attention_mask"])
    assert logits.shape == (4, 17)
    torch.nn.functional.cross_entropy(logits, example["labels"]).backward()
    assert module.training
    assert module.model.training, "from_pretrained gives a network in eval mode"
    assert all(p.grad is not None for p in module.parameters())


def test_padding_does_not_change_the_logits():
    module = TextClassifier("demo").eval()
    ids = torch.randint(5, 4096, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    alone = module(ids, torch.ones_like(ids))
    torch.testing.assert_close(module(padded, (padded != 0).long()), alone, atol=1e-5, rtol=1e-5)


def test_random_weights_differ_from_pretrained_and_follow_the_seed():
    def weight(pretrained):
        torch.manual_seed(1)
        return dict(TextClassifier("demo", pretrained=pretrained).named_parameters())[
            "model.model.layers.0.attn.Wqkv.weight"
        ]

    assert torch.equal(weight(False), weight(False))
    assert not torch.equal(weight(False), weight(True))


def test_fit_test_and_predict():
    L.seed_everything(0)
    module, data = TextClassifier("demo"), TextClassificationData("demo", batch_size=4)
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=2,
        limit_test_batches=1,
        limit_predict_batches=1,
        **QUIET,
    )
    trainer.fit(module, data)
    assert {"train/loss", "val/loss", "val/acc", "val/f1"} <= set(trainer.callback_metrics)
    assert set(trainer.test(module, data, verbose=False)[0]) == {"test/loss", "test/acc", "test/f1"}
    (probabilities,) = trainer.predict(module, data)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))


def test_optimizer_holds_the_trainable_parameters_only_and_does_not_decay_vectors():
    module = TextClassifier("demo", weight_decay=0.1)
    module.model.model.requires_grad_(False)
    groups = {}

    class Probe(L.Callback):
        def on_train_start(self, trainer, pl_module):
            for group in trainer.optimizers[0].param_groups:
                groups[group["weight_decay"]] = group["params"]

    L.Trainer(max_steps=1, limit_val_batches=0, callbacks=[Probe()], **QUIET).fit(
        module, TextClassificationData("demo", batch_size=2)
    )
    held = {id(p) for params in groups.values() for p in params}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert {p.ndim for p in groups[0.0]} == {1}
    assert {p.ndim for p in groups[0.1]} == {2}


def test_rate_rises_to_its_peak_then_falls_to_nothing():
    rates = []

    class Probe(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = L.Trainer(max_steps=10, limit_val_batches=0, callbacks=[Probe()], **QUIET)
    trainer.fit(TextClassifier("demo", lr=1.0, warmup=0.2), TextClassificationData("demo", batch_size=2))
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_decoders_classify_too(gpt2):
    module = TextClassifier(gpt2, num_labels=3)
    example = batch(classes=3)
    assert module(example["input_ids"], example["attention_mask"]).shape == (4, 3)


def test_wrong_number_of_classes_says_which_to_pass():
    module = TextClassifier("demo", num_labels=5)
    with pytest.raises(ValueError, match=r"5 classes, but the data has 17 \(text, .*pass num_labels=17"):
        L.Trainer(max_steps=1, **QUIET).fit(module, TextClassificationData("demo"))
