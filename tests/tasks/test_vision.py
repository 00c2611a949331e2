"""ImageClassifier: any network, its weights, and errors that name what is wrong."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.data import ImageData
from lightning_peft.tasks import ImageClassifier

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def conv_net(width=8, classes=2):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


NETWORK = f"{__name__}.conv_net"


@pytest.fixture
def data(tmp_path):
    labels = np.arange(32) % 2
    images = np.random.default_rng(0).integers(0, 60, (32, 8, 8, 3), dtype=np.uint8)
    images[labels == 1, ..., 0] += 150  # the second class is red
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    path = str(tmp_path / "images.npz")
    return ImageData(path, path, path, batch_size=16)


def test_fits_tests_predicts_and_loads_again(data, tmp_path):
    L.seed_everything(0)
    module = ImageClassifier(NETWORK, 2, lr=0.05)
    trainer = L.Trainer(max_epochs=10, callbacks=[lp.LoRA(r=2, targets=["0", "4"])], **QUIET)
    trainer.fit(module, data)
    assert trainer.test(module, data, verbose=False)[0]["test/acc"] == 1.0
    predicted = torch.cat(trainer.predict(module, data)).argmax(-1)
    assert predicted.tolist() == [0, 1] * 16
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    weights = tmp_path / "base.pt"
    base = {k: v for k, v in nn.Module.state_dict(module.network).items() if "adapters" not in k}
    torch.save({"state_dict": {f"module.{k}": v for k, v in base.items()}}, weights)
    again = lp.load_from_checkpoint(ImageClassifier, tmp_path / "x.ckpt", network=NETWORK, weights=str(weights)).eval()
    images = next(iter(data.test_dataloader()))["images"]
    assert torch.equal(again(images), module.eval()(images))


def test_weights_that_do_not_fit(tmp_path):
    torch.save(conv_net(4).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match=r"narrow.pt does not fit Sequential: (?s:.*)size mismatch"):
        ImageClassifier(NETWORK, 2, weights=str(tmp_path / "narrow.pt"))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt does not contain a state dict"):
        ImageClassifier(NETWORK, 2, weights=str(tmp_path / "list.pt"))
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere.pt'"):
        ImageClassifier(NETWORK, 2, weights="nowhere.pt")


def test_invalid_networks():
    with pytest.raises(ValueError, match=r"network='torch.nn.Lineal' is not the import path"):
        ImageClassifier("torch.nn.Lineal", 2)
    with pytest.raises(ValueError, match=r"network='resnet' is not the import path"):
        ImageClassifier("resnet", 2)
    with pytest.raises(ValueError, match=r"returns int, expected an nn.Module"):
        ImageClassifier("builtins.int", 2)


def test_another_number_of_classes_is_an_error(data):
    with pytest.raises(ValueError, match=r"has 3 classes, but the data has 2 \(0, 1\): pass num_classes=2"):
        L.Trainer(max_steps=1, **QUIET).fit(ImageClassifier(NETWORK, 3), data)
