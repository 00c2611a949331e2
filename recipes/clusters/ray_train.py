"""One training run on the workers of a Ray cluster, with Ray Train's integration of Lightning.

    pip install "ray[train]"
    python recipes/clusters/ray_train.py --workers 2 --storage /shared/runs [--gpu]

Ray starts the workers, and each calls `train`, which contains nothing specific to lightning_peft: the method is a
callback, as in any Trainer. Ray stores the checkpoints that the Trainer saves, which hold the trainable state only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
from ray.train import RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer

import lightning_peft as lp
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassifier


def train(settings: dict) -> None:
    """Run in every worker."""
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=settings["epochs"],
        accelerator="auto" if settings["gpu"] else "cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[lp.LoRA(r=8, targets="all-linear", trainable=["classifier"]), RayTrainReportCallback()],
        enable_checkpointing=False,  # RayTrainReportCallback saves a checkpoint after every epoch
        enable_progress_bar=False,
        logger=False,
    )
    prepare_trainer(trainer).fit(TextClassifier("demo", lr=2e-3), TextClassificationData("demo", batch_size=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", type=Path, required=True, help="a folder that every node sees")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    settings = parser.parse_args()

    result = TorchTrainer(
        train,
        train_loop_config={"epochs": settings.epochs, "gpu": settings.gpu},
        scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=settings.gpu),
        run_config=RunConfig(name="lora", storage_path=str(settings.storage.resolve())),
    ).fit()
    print(result.metrics)
    print(f"checkpoint: {result.checkpoint.path}/{RayTrainReportCallback.CHECKPOINT_NAME}")


if __name__ == "__main__":
    main()
