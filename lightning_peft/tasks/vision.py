"""Image classification with any network."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.core.targeting.sites import output_head
from lightning_peft.pretrained import InputError
from lightning_peft.tasks.base import Batch, Classifier, label_loss
from lightning_peft.tasks.metrics import CLASSES


class ImageClassifier(Classifier):
    """An image classifier with one label per image.

    A batch may name an adapter for each image, as ``"adapters"`` (see :func:`lightning_peft.rows`).

    Logs ``train/loss``, and ``loss`` and the metrics under ``val/`` and ``test/``.

    Args:
        network: The import path of a class, function or method that returns an ``nn.Module``
            (``"torchvision.models.resnet18"``, ``"transformers.AutoModelForImageClassification.from_pretrained"``). The
            network maps images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``, as a tensor or
            as the ``logits`` of a Hugging Face output.
        num_classes: The number of classes; ``None`` uses that of the data. If the network has another number of
            outputs, its output layer is replaced by a new one.
        network_args: The arguments of ``network``.
        weights: A file of pretrained weights: a state dict, or a dictionary with one under ``state_dict``. A prefix
            ``module.`` on every name (from DataParallel) is removed.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices and kernels only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0.
        labels: The names of the classes, in the order of the outputs; ``None`` uses those of the data.
        metrics: ``acc``, ``f1``, ``precision``, ``recall``, ``auroc`` and ``mcc``; ``acc`` by default.

    Raises:
        InputError: if ``network`` cannot be imported or does not return an ``nn.Module``, or ``weights`` do not fit it.
        FileNotFoundError: if the file ``weights`` does not exist.

    Example::

        ImageClassifier("timm.create_model", network_args={"model_name": "vit_small_patch16_224", "pretrained": True})
    """

    #: a checkpoint's hyperparameters must not set these, because they name what is imported, called and opened
    from_user = ("network", "network_args", "weights")
    from_data = ("labels", "num_classes")
    network_name = "network"
    number_name = "num_classes"
    metric_names = ("acc",)
    known_metrics = CLASSES

    def __init__(
        self,
        network: str,
        num_classes: int | None = None,
        network_args: dict[str, Any] | None = None,
        weights: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        labels: list[str] | None = None,
        metrics: list[str] | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, metrics)
        self.build(num_classes, labels)

    def create(self, num_labels: int | None) -> None:
        """Build the network, and give it an output layer with ``num_labels`` outputs if it has another number."""
        given = self.hparams
        self.network: Any = None
        self.network = _build(given["network"], given["network_args"] or {})
        if given["weights"] is not None:
            _load(self.network, Path(given["weights"]).expanduser())
        head = _find_head(self.network)
        outputs = getattr(self.network.get_submodule(head), "out_features", None) if head is not None else None
        self._fresh = []
        if num_labels is not None and outputs is not None and outputs != num_labels:
            _replace_head(self.network, str(head), num_labels)
            self._fresh = [f"network.{head}"]
        self.num_labels = num_labels or outputs or 0
        if not self.num_labels:
            raise InputError(
                f"the number of outputs of {type(self.network).__name__} cannot be determined: pass num_classes to "
                "ImageClassifier."
            )
        self.created()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.num_labels

    @property
    def fresh_modules(self) -> list[str]:
        """The output layer, if it was replaced by one with another number of outputs."""
        return self._fresh

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(batch, num_classes)`` from images ``(batch, channels, height, width)``."""
        out = self.network(images)
        return getattr(out, "logits", out)

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of a batch ``{"images", "labels"}``, and the logits."""
        logits = self(batch["images"])
        return label_loss(logits, batch["labels"]), logits

    def update(self, scores: Any, output: Tensor, batch: Batch) -> None:
        """Update the metrics with logits ``(batch, num_classes)``."""
        scores.update(output, batch["labels"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of each class, ``(batch, num_classes)``."""
        with self.adapters_of(batch):
            return self(batch["images"]).float().softmax(-1)

    def prediction_columns(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """``label``, the most likely one, and its ``probability``."""
        return dict(self.label_columns(output))


def _find_head(network: nn.Module) -> str | None:
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[0] if len(linear) == 1 else output_head(network)


def _replace_head(network: nn.Module, name: str, outputs: int) -> None:
    head = network.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"the output layer {name!r} is a {type(head).__name__} and cannot be replaced: pass the number of classes "
            "in network_args."
        )
    new = nn.Linear(head.in_features, outputs, head.bias is not None, head.weight.device, head.weight.dtype)
    network.set_submodule(name, new)


def _build(path: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"network={path!r} is not the import path of a class, function or method: {error}.") from error
    network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise InputError(f"network={path!r} returns {type(network).__name__}, expected an nn.Module.")
    return network


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {str(path)!r}.")
    state = read_torch_file(path)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights: {path.name} does not contain a state dict.")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"weights: {path.name} does not fit {type(network).__name__}: {error}") from error
