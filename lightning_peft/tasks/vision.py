"""Image classification with any network."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.core.switching.rows import rows
from lightning_peft.tasks.optim import adamw


class ImageClassifier(L.LightningModule):
    """An image classifier with one label per image.

    A batch may name an adapter for each image, as ``"adapters"`` (see :func:`lightning_peft.rows`).

    Logs ``train/loss``, and ``loss`` and ``acc`` (accuracy) under ``val/`` and ``test/``.

    Args:
        network: The import path of a class, function or method that returns an ``nn.Module``
            (``"torchvision.models.resnet18"``, ``"transformers.AutoModelForImageClassification.from_pretrained"``). The
            network maps images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``, as a tensor or
            as the ``logits`` of a Hugging Face output.
        num_classes: The number of classes.
        network_args: The arguments of ``network``.
        weights: A file of pretrained weights: a state dict, or a dictionary with one under ``state_dict``. A prefix
            ``module.`` on every name (from DataParallel) is removed.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices and kernels only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.

    Raises:
        ValueError: ``network`` cannot be imported or does not return an ``nn.Module``, or ``weights`` do not fit it.
        FileNotFoundError: The file ``weights`` does not exist.

    Example::

        ImageClassifier("torchvision.models.resnet18", num_classes=10, network_args={"num_classes": 10})
    """

    #: a checkpoint's hyperparameters must not set these, because they name what is imported, called and opened
    from_user = ("network", "network_args", "weights")

    def __init__(
        self,
        network: str,
        num_classes: int,
        network_args: dict[str, Any] | None = None,
        weights: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy

        self.save_hyperparameters()
        self.num_classes = num_classes
        self.network = _build(network, network_args or {})
        if weights is not None:
            _load(self.network, Path(weights).expanduser())
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Check that the data has as many classes as the model.

        Raises:
            ValueError: The numbers differ.
        """
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if classes and len(classes) != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes}, but the data has {len(classes)} "
                f"({', '.join(map(str, classes[:5]))}{', …' if len(classes) > 5 else ''})."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(batch, num_classes)`` from images ``(batch, channels, height, width)``."""
        out = self.network(images)
        return getattr(out, "logits", out)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch ``{"images", "labels"}``."""
        loss = nn.functional.cross_entropy(self._logits(batch), batch["labels"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/acc``."""
        self._score(batch, "val", self.val_acc)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/acc``."""
        self._score(batch, "test", self.test_acc)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely class of each image, ``(batch,)``."""
        return self._logits(batch).argmax(-1)

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, with a linear warmup and decay."""
        return adamw(self, self.hparams["lr"], self.hparams["weight_decay"], self.hparams["warmup"])

    def _logits(self, batch: dict[str, Any]) -> Tensor:
        with rows(self, batch.get("adapters")):
            return self(batch["images"])

    def _score(self, batch: dict[str, Tensor], stage: str, accuracy: Any) -> None:
        logits, labels = self._logits(batch), batch["labels"]
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, prog_bar=True, batch_size=len(labels))


def _build(path: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"network={path!r} is not the import path of a class, function or method: {error}.") from error
    network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise ValueError(f"network={path!r} returns {type(network).__name__}, expected an nn.Module.")
    return network


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {str(path)!r}.")
    state = read_torch_file(path)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path.name} does not contain a state dict.")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: {path.name} does not fit {type(network).__name__}: {error}") from error
