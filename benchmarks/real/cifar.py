"""A ResNet-20 pretrained on CIFAR-10, adapted to the same images after JPEG compression."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np

from benchmarks.real.study import Row, Study, need
from lightning_peft.data import ImageData
from lightning_peft.tasks import ImageClassifier

CONVS = ["re:.*layer.*conv.", "linear"]


class Cifar(Study):
    name = "cifar"
    title = "ResNet-20 on JPEG CIFAR-10: a domain shift"
    task = (
        "The pretrained network scores 91.8 % on CIFAR-10; on the same kind of images after JPEG compression it "
        "loses ten points. Trained on 1,000 such images, tested on another 1,000 (one standard error is about "
        "1.2 points), mirrored and shifted by up to 2 pixels in training."
    )
    metrics = {"accuracy %": "{:.1f}", "loss": "{:.3f}"}
    higher_is_better = True
    steps = 240
    grid = "1e-4, 3e-4, 1e-3, 3e-3, 1e-2"
    rows = (
        Row("base"),
        Row("linear probe", "LinearProbe", {"head": "linear"}, 3e-3),
        Row("norm tuning", "NormTuning", {"trainable": "linear"}, 3e-3),
        Row("BitFit", "BitFit", {"trainable": "linear"}, 3e-3),
        Row("SSF", "SSF", {"targets": CONVS}, 3e-3),
        Row("bottleneck, 8", "BottleneckAdapter", {"targets": "re:.*layer..[0-9]", "bottleneck_size": 8}, 3e-3),
        Row("LoRA r=4, convolutions", "LoRA", {"r": 4, "alpha": 8, "targets": CONVS}, 3e-3),
        Row("DoRA r=4, convolutions", "DoRA", {"r": 4, "alpha": 8, "targets": CONVS}, 3e-3),
        Row("last block", "LastLayers", {}, 1e-3),
        Row("full fine-tuning", "FullFineTuning", {}, 3e-4),
    )

    def prepare(self, folder: Path, tuning: bool) -> None:
        self.weights = str(need("cifar_resnet/resnet20-12fca82f.th"))
        self.train = str(need("cifar10/cifar10_train_1000_a.npz"))
        self.test = str(need("cifar10/cifar10_test_1000.npz"))
        if tuning:
            with np.load(self.train) as arrays:
                images, labels, classes = arrays["images"], arrays["labels"], arrays["classes"]
            held = np.arange(len(labels)) % 4 == 0
            self.train, self.test = str(folder / "train.npz"), str(folder / "held.npz")
            np.savez(self.train, images=images[~held], labels=labels[~held], classes=classes)
            np.savez(self.test, images=images[held], labels=labels[held], classes=classes)

    def module(self, lr: float) -> ImageClassifier:
        return ImageClassifier("benchmarks.real.resnet.ResNet20", 10, weights=self.weights, lr=lr)

    def data(self) -> ImageData:
        return ImageData(self.train, test=self.test, crop=2, batch_size=64)

    def scores(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
        found = trainer.test(module, data, verbose=False)[0]
        return {"accuracy %": 100 * found["test/acc"], "loss": found["test/loss"]}


STUDY = Cifar()
