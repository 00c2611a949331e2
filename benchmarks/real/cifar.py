"""A ResNet-20 pretrained on CIFAR-10, adapted to the same images after JPEG compression."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np

from benchmarks.real.study import Row, Study, need
from lightning_peft.data import ImageData
from lightning_peft.tasks import ImageClassifier

TUNING = 300
CONVS = {"targets": "re:.*layer.*conv.", "trainable": "linear"}
HEAD = {"trainable": "linear"}
BLOCKS = {"targets": "re:.*layer\\d[.]\\d", "bottleneck_size": 8, "trainable": "linear"}


class Cifar(Study):
    name = "cifar"
    title = "ResNet-20 on JPEG CIFAR-10: a domain shift"
    task = (
        "The pretrained network scores 91.8 % on CIFAR-10's test images; on such images after JPEG compression it "
        "loses eleven points. Training uses 1,000 compressed images, mirrored and shifted by up to 2 pixels; the "
        "test uses "
        "700 (one standard error is about 1.4 points; another 300 chose the learning rates). The classifier, 650 "
        "parameters, trains with every method. The training images are from CIFAR-10's training set, which the network "
        "has seen before compression."
    )
    metrics = {"accuracy %": "{:.1f}", "loss": "{:.3f}"}
    higher_is_better = True
    steps = 120
    search_steps = 120
    rows = (
        Row("base"),
        Row("linear probe", "LinearProbe", {}, 3e-2),
        Row("BitFit", "BitFit", HEAD, 3e-2),
        Row("norm tuning", "NormTuning", HEAD, 1e-2),
        Row("SSF", "SSF", HEAD, 1e-2),
        Row("bottleneck of 8 after each block", "BottleneckAdapter", BLOCKS, 1e-2),
        Row("LoRA r=4 on convolutions", "LoRA", {"r": 4, "alpha": 8, **CONVS}, 1e-2),
        Row("DoRA r=4 on convolutions", "DoRA", {"r": 4, "alpha": 8, **CONVS}, lr_of="LoRA r=4 on convolutions"),
        Row("last block", "LastLayers", {}, 3e-3),
        Row("full fine-tuning", "FullFineTuning", {}, 3e-4),
    )

    def prepare(self, folder: Path, tuning: bool) -> None:
        self.weights = str(need("cifar_resnet/resnet20-12fca82f.th"))
        self.train = str(need("cifar10/cifar10_train_1000_a.npz"))
        self.test = str(need("cifar10/cifar10_test_1000.npz"))
        with np.load(self.test) as arrays:
            images, labels, classes = arrays["images"], arrays["labels"], arrays["classes"]
        # Training images cannot be held out for the search, because the network has seen all of them before
        # compression.
        chosen = slice(0, TUNING) if tuning else slice(TUNING, None)
        self.test = str(folder / "test.npz")
        np.savez(self.test, images=images[chosen], labels=labels[chosen], classes=classes)

    def module(self, lr: float) -> ImageClassifier:
        return ImageClassifier("benchmarks.real.resnet.ResNet20", 10, weights=self.weights, lr=lr)

    def data(self) -> ImageData:
        return ImageData(self.train, test=self.test, crop=2, batch_size=64)

    def scores(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
        found = trainer.test(module, data, verbose=False)[0]
        return {"accuracy %": 100 * found["test/acc"], "loss": found["test/loss"]}


STUDY = Cifar()
