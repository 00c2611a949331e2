"""A column that names each row's adapter, from the file to the predictions, in Python and on the command line."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.data import GenerationData, ImageData, LanguageModelData, TextClassificationData
from lightning_peft.tasks import ImageClassifier, LanguageModel, TextClassifier
from tests.helpers import perturb
from tests.tasks.test_text import QUIET

TENANTS = ["a", "b", "", "a", "", "b"]


@pytest.fixture
def reviews(tmp_path):
    rows = [f"text number {i},{'x' if i % 2 else 'y'},{name}" for i, name in enumerate(TENANTS)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["text,label,tenant", *rows]) + "\n")
    return str(path)


def tenants() -> list[lp.PEFTMethod]:
    return [lp.LoRA(r=2, name="a"), lp.IA3(name="b")]


def apart(module: L.LightningModule, names: list[str], run) -> torch.Tensor:
    outputs = []
    with torch.no_grad():
        for i, name in enumerate(names):
            with lp.active(module, *([name] if name else [])):
                outputs.append(run(i))
    return torch.cat(outputs)


def text(reviews: str, **options):
    return TextClassificationData(reviews, test=reviews, adapter_column="tenant", tokenizer="demo", **options)


def test_predict_serves_the_adapter_of_each_row(reviews):
    module, data = TextClassifier("demo", num_labels=17), text(reviews, batch_size=4)
    data.setup()
    data.labels = data.labels + ["z"] * 15
    trainer = L.Trainer(**QUIET, callbacks=tenants())
    lp.apply(module, *[m for m in trainer.callbacks if isinstance(m, lp.PEFTMethod)])
    perturb(module)
    got = torch.cat(trainer.predict(module, data))
    batches = list(data.test_dataloader())
    assert [name for b in batches for name in b["adapters"]] == [name or None for name in TENANTS]
    rows = [
        (b["input_ids"][i : i + 1], b["attention_mask"][i : i + 1]) for b in batches for i in range(len(b["labels"]))
    ]
    want = apart(module.eval(), TENANTS, lambda i: module(*rows[i]).softmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 1e-4


def test_fit_trains_each_adapter_on_its_rows(reviews):
    module = TextClassifier("demo", num_labels=17)
    data = text(reviews, batch_size=2, validation=reviews)
    data.setup()
    data.labels = data.labels + ["z"] * 15
    L.seed_everything(1)
    trainer = L.Trainer(**QUIET, callbacks=[lp.LoRA(r=2, name="a"), lp.LoRA(r=2, name="b")], max_epochs=2)
    trainer.fit(module, data)
    moved = {k: v for k, v in lp.adapter_state(module).items() if k.endswith("lora_B")}
    assert all(bool(v.any()) for v in moved.values())
    assert any(".a." in k for k in moved)
    assert any(".b." in k for k in moved)


def test_language_models(reviews, gpt2):
    for data in (
        LanguageModelData(reviews, test=reviews, adapter_column="tenant", batch_size=6),
        GenerationData(reviews, test=reviews, prompt="text", target="label", adapter_column="tenant", batch_size=6),
    ):
        module = LanguageModel(gpt2, max_new_tokens=4)
        trainer = L.Trainer(**QUIET, callbacks=[lp.LoRA(r=2, name="a"), lp.LoRA(r=3, name="b")])
        trainer.test(module, data, verbose=False)
        perturb(module)
        (got,) = trainer.predict(module, data)
        (batch,) = data.predict_dataloader()
        inputs = [(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1]) for i in range(6)]
        for i, name in enumerate(TENANTS):
            with lp.active(module, *([name] if name else [])):
                assert got[i] == module.write(*inputs[i], max_new_tokens=4)[0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_with_an_adapter_for_each_prompt(gpt2, options):
    module = LanguageModel(gpt2)
    lp.apply(module, *tenants())
    perturb(module, scale=0.5)
    prompts, names = ["one", "two", "three words", "four"], ["a", None, "b", "a"]
    got = module.generate(prompts, 5, names, **options)
    want = []
    for prompt, name in zip(prompts, names):
        with lp.active(module, *([name] if name else [])):
            want += module.generate([prompt], 5, **options)
    assert got == want
    with pytest.raises(lp.RowError, match=r"batch of .* for 3 names"):
        module.generate(prompts, 5, names[:3], **options)


def test_blocks_hold_texts_of_several_adapters(reviews, gpt2):
    data = LanguageModelData(reviews, adapter_column="tenant", tokenizer=gpt2, block_size=2)
    data.setup()
    with pytest.raises(ValueError, match="block_size=None"):
        data.train_dataloader()


def test_a_column_of_numbers_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,tenant\ngood,x,1\nbad,y,2\n")
    data = text(str(path))
    data.setup()
    with pytest.raises(ValueError, match="row 0 has 1 in the column 'tenant'"):
        data.train_dataloader()


def test_images(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    path = str(tmp_path / "images.npz")
    np.savez(path, images=images, labels=np.arange(6) % 4, tenant=np.array(TENANTS))
    data = ImageData(path, test=path, adapters="tenant", batch_size=4)
    module = ImageClassifier("tests.kinds.ResNet", num_classes=4)
    trainer = L.Trainer(**QUIET, callbacks=[lp.LoRA(r=2, targets=["type:Conv2d"], name=name) for name in "ab"])
    trainer.test(module, data, verbose=False)
    perturb(module)
    got = torch.cat(trainer.predict(module, data)).argmax(-1)
    batches = list(data.test_dataloader())
    images = torch.cat([batch["images"] for batch in batches])
    assert [name for b in batches for name in b["adapters"]] == [name or None for name in TENANTS]
    want = apart(module.eval(), TENANTS, lambda i: module(images[i : i + 1]).argmax(-1))
    assert torch.equal(got, want)
    bad = str(tmp_path / "bad.npz")
    np.savez(
        bad, images=images.numpy().astype("uint8").transpose(0, 2, 3, 1), labels=np.arange(6) % 2, tenant=np.arange(6)
    )
    with pytest.raises(ValueError, match="'tenant' is int64"):
        ImageData(bad, adapters="tenant").setup()


def test_command_line(reviews, gpt2, capsys):
    run = [
        "predict",
        "--model=lightning_peft.tasks.LanguageModel",
        f"--model.model={gpt2}",
        "--data=lightning_peft.data.LanguageModelData",
        f"--data.source={reviews}",
        f"--data.test={reviews}",
        "--data.adapter_column=tenant",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=LoRA",
        "--trainer.callbacks.name=a",
    ]
    with pytest.raises(SystemExit, match=r"row 1: no adapter named 'b'.*the model has \['a'\]"):
        main(run)
    main([*run, "--trainer.callbacks+=IA3", "--trainer.callbacks.name=b"])
