"""Models of packages that CI does not install: COMET, chemprop, pytorch-tabular, scvi-tools, darts, speechbrain, ...

Most are LightningModules with their own steps and optimizers. The tests run if the packages are installed; the releases
that they were run with are in .ci/packages_by_hand.txt.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tests.integration.packages.case import METHODS, Case, Own
from tests.integration.packages.networks import bert
from tests.integration.packages.vision import images, of

# --- unbabel-comet ----------------------------------------------------------------------------------------------

SENTENCES = [
    {"src": "a b", "mt": "a c good", "ref": "a b good", "score": 0.9},
    {"src": "c", "mt": "b", "ref": "bad", "score": 0},
]


@cache
def regression() -> type:
    class Regression(import_module("comet.models").RegressionMetric):
        def __init__(self, class_identifier: str = "", **options: Any) -> None:  # a checkpoint has both
            super().__init__(**options)
            # COMET unpacks three outputs, but from release 5 transformers leaves out the pooled one, which is None.
            self.encoder.model.register_forward_hook(lambda module, args, out: (out[0], None, out[1]))

    return Regression


def comet() -> Any:
    table = Path(bert()) / "train.csv"
    rows = [",".join(str(value) for value in row.values()) for row in SENTENCES * 10]
    table.write_text("\n".join(["src,mt,ref,score", *rows]))
    return regression()(
        encoder_model="BERT",
        pretrained_model=bert(),
        load_pretrained_weights=False,
        local_files_only=True,
        hidden_sizes=[16],
        nr_frozen_epochs=0,
        learning_rate=0.03,
        encoder_learning_rate=0.03,
        train_data=[str(table)],
        validation_data=[str(table)],
    )


def translations(stage: str) -> Any:
    return comet().prepare_sample(
        [{k: v for k, v in s.items() if stage == "fit" or k != "score"} for s in SENTENCES], stage
    )


# --- chemprop ---------------------------------------------------------------------------------------------------


def chemprop() -> Any:
    package = import_module("chemprop")
    return package.models.MPNN(
        package.nn.BondMessagePassing(d_h=16, depth=2),
        package.nn.MeanAggregation(),
        package.nn.RegressionFFN(input_dim=16, hidden_dim=16),
        init_lr=0.03,
        max_lr=0.03,
        final_lr=0.03,
    )


@cache
def molecules() -> Any:
    data = import_module("chemprop.data")
    points = [data.MoleculeDatapoint.from_smi(smiles, [1.0]) for smiles in ("CCO", "CCN", "C=O", "CC(C)O")]
    return next(iter(data.build_dataloader(data.MoleculeDataset(points), batch_size=4, shuffle=False)))


# --- pytorch-tabular --------------------------------------------------------------------------------------------


def tabular() -> Any:
    package, config = import_module("pytorch_tabular.models"), import_module("pytorch_tabular.config")
    model = package.CategoryEmbeddingModelConfig(task="regression", layers="16-16", learning_rate=0.03)
    data = config.DataConfig(target=["y"], continuous_cols=["a", "b"], categorical_cols=["c"])
    omegaconf = import_module("omegaconf").OmegaConf
    parts = (data, model, config.TrainerConfig(), config.OptimizerConfig())
    merged = omegaconf.merge(*(omegaconf.to_container(omegaconf.structured(part)) for part in parts))
    inferred = config.InferredConfig(1, 2, 1, categorical_cardinality=[4], embedding_dims=[[4, 2]])
    return package.CategoryEmbeddingModel(config=merged, inferred_config=omegaconf.structured(inferred))


def rows() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    numbers = torch.randn(6, 2, generator=made)
    return {"continuous": numbers, "categorical": torch.arange(6)[:, None] % 4, "target": torch.ones(6, 1)}


# --- scvi-tools -------------------------------------------------------------------------------------------------


def scvi() -> Any:
    module = import_module("scvi.module").VAE(n_input=12, n_hidden=16, n_latent=4)
    return import_module("scvi.train").TrainingPlan(module, lr=0.03)


def cells() -> dict[str, Tensor]:
    counts = torch.randint(0, 9, (6, 12), generator=torch.Generator().manual_seed(1)).float()
    return {"X": counts, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}


# --- darts, neuralforecast --------------------------------------------------------------------------------------


@cache
def darts() -> Any:
    """A module that darts has built, a batch of its ``training_step`` and the arguments of its ``forward``."""
    numpy, models = import_module("numpy"), import_module("darts.models")
    series = import_module("darts").TimeSeries.from_values(numpy.sin(numpy.arange(40) / 3).astype("float32"))
    grab = Grab()
    options = {"accelerator": "cpu", "callbacks": [grab], "enable_progress_bar": False, "logger": False}
    model = models.TiDEModel(
        8, 4, hidden_size=16, optimizer_kwargs={"lr": 0.03}, random_state=0, n_epochs=1, pl_trainer_kwargs=options
    )
    model.fit(series)
    return model.model, grab.batch, grab.inputs


class Grab(pl.Callback):
    """Keeps a batch of a fit, and what the module's forward gets for it."""

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.handle = pl_module.register_forward_pre_hook(lambda module, args: setattr(self, "inputs", args))

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.handle.remove()


@cache
def waves() -> Any:
    numpy, data = import_module("numpy"), import_module("neuralforecast.tsdataset")
    table = {
        "unique_id": numpy.repeat(["a", "b"], 20),
        "ds": numpy.tile(numpy.arange(20), 2),
        "y": numpy.sin(numpy.arange(40)),
    }
    dataset = data.TimeSeriesDataset.from_df(import_module("pandas").DataFrame(table))[0]
    return next(iter(data.TimeSeriesDataModule(dataset, batch_size=2, shuffle_train=False).train_dataloader()))


def windows() -> dict[str, Tensor | None]:
    values = torch.randn(4, 8, 1, generator=torch.Generator().manual_seed(1))
    none = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    return {"insample_y": values, "insample_mask": torch.ones_like(values), **none}


def nhits() -> Any:
    losses = import_module("neuralforecast.losses.pytorch")
    return import_module("neuralforecast.models").NHITS(
        h=4, input_size=8, mlp_units=3 * [[16, 16]], learning_rate=0.03, max_steps=3, loss=losses.MAE()
    )


CASES = {
    "COMET RegressionMetric": Own(
        "unbabel-comet",
        comet,
        lambda: translations("predict"),
        result=lambda out: out.score,
        batches=lambda: [translations("fit")] * 3,
        pl=pl,
    ),
    "chemprop MPNN": Own(
        "chemprop",
        chemprop,
        lambda: (molecules().bmg,),
        batches=lambda: [molecules()] * 3,
        arguments=lambda m: {"message_passing": m.message_passing, "agg": m.agg, "predictor": m.predictor},
    ),
    "pytorch-tabular CategoryEmbeddingModel": Own(
        "pytorch-tabular",
        tabular,
        lambda: (rows(),),
        batches=lambda: [rows()] * 3,
        result=lambda out: out["logits"],
        pl=pl,
        arguments=lambda m: {"config": m.hparams, "inferred_config": m.hparams},
    ),
    "darts TiDE": Own(
        "darts",
        lambda: type(darts()[0])(**darts()[0].hparams),
        lambda: darts()[2],
        result=lambda out: out.prediction,
        batches=lambda: [darts()[1]] * 3,
        pl=pl,
        plain_hyperparameters=False,
    ),
    "neuralforecast NHITS": Own(
        "neuralforecast",
        nhits,
        lambda: (windows(),),
        batches=lambda: [waves()] * 3,
        pl=pl,
        arguments=lambda m: {"loss": m.loss, "valid_loss": m.valid_loss},
    ),
    "scvi VAE": Own(
        "scvi-tools",
        scvi,
        lambda: (cells(),),
        batches=lambda: [cells()] * 3,
        result=lambda out: out[0]["qz"].loc,
        options={m: {"exclude": ["l_encoder", "px_r_decoder"]} for m in METHODS},
        arguments=lambda m: {"module": m.module},
    ),
    "speechbrain ECAPA_TDNN": Case(
        "speechbrain",
        of(
            "speechbrain.lobes.models.ECAPA_TDNN",
            "ECAPA_TDNN",
            input_size=8,
            lin_neurons=6,
            channels=[16] * 5,
            kernel_sizes=[3] * 5,
            dilations=[1] * 5,
            attention_channels=8,
            res2net_scale=2,
            se_channels=8,
        ),
        images(12, 8),
        {"LoRA": {"targets": "type:Conv1d"}},
    ),
}
