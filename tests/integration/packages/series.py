"""LightningModules of pytorch-forecasting, whose hyperparameters are objects of the package."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from tests.integration.packages.case import Case
from tests.integration.skeletons import seeded


@cache
def dataset() -> Any:
    """Two sine waves; the model predicts four values from eight."""
    time = np.tile(np.arange(20), 2)
    values = np.sin(np.arange(40) / 3).astype("float32")
    frame = import_module("pandas").DataFrame({"time": time, "wave": np.repeat(["a", "b"], 20), "value": values})
    lengths = {f"{edge}_{part}_length": n for part, n in (("encoder", 8), ("prediction", 4)) for edge in ("min", "max")}
    return import_module("pytorch_forecasting").TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["wave"], time_varying_unknown_reals=["value"], **lengths
    )


class Forecast(Case):
    """A LightningModule of pytorch-forecasting with its own steps and optimizer."""

    def module(self) -> Any:
        return seeded(self.build)

    def loader(self) -> DataLoader:
        return dataset().to_dataloader(batch_size=4)

    @torch.no_grad()
    def output(self, module: nn.Module) -> Tensor:
        inputs, _ = next(iter(dataset().to_dataloader(train=False, batch_size=4)))
        return module.eval()(inputs).prediction

    def load(self, path: Path) -> Any:
        """A new module from the checkpoint. Objects are passed again, because files never build objects."""
        module = self.module()
        return seeded(lambda: lp.load_from_checkpoint(type(module), path, weights_only=False, **module.hparams))


def forecast(name: str, **options: Any) -> Any:
    return lambda: getattr(import_module("pytorch_forecasting"), name).from_dataset(
        dataset(), learning_rate=0.03, optimizer="adam", **options
    )


UNUSED = {"exclude": ["static_context_variable_selection"]}  # it has no static variables to select from

CASES = {
    "pytorch-forecasting NBeats": Forecast(
        "pytorch-forecasting", forecast("NBeats", widths=[16, 16]), tuple, plain_hyperparameters=False
    ),
    "pytorch-forecasting TemporalFusionTransformer": Forecast(
        "pytorch-forecasting",
        forecast("TemporalFusionTransformer", hidden_size=8, attention_head_size=2, hidden_continuous_size=4),
        tuple,
        dict.fromkeys(("LoRA", "SSF", "BitFit"), UNUSED),
        plain_hyperparameters=False,
    ),
}
