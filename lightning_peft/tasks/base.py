"""The base class of the tasks: optimizer, losses, metrics, an adapter per row, and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.names import nearest
from lightning_peft.core.switching.rows import rows
from lightning_peft.pretrained import InputError, fresh_modules, load_model
from lightning_peft.tasks.metrics import make_metrics
from lightning_peft.tasks.optim import adamw

Batch = dict[str, Any]


class Task(L.LightningModule):
    """Steps, logging and optimizer of a task. The base class of the tasks.

    A subclass builds its network in ``__init__`` as the attribute ``network_name`` and implements :meth:`compute`,
    :meth:`predict_step` and :meth:`prediction_columns`. A batch may name an adapter for each row, as ``"adapters"``
    (see :func:`lightning_peft.rows`).

    Logs ``train/loss``, and the loss and the metrics under ``val/`` and ``test/``.

    Args:
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay, applied to matrices only.
        warmup: Fraction of the steps during which the rate rises to ``lr``; it then falls linearly to 0. For another
            optimizer or schedule, pass ``optimizer`` and ``lr_scheduler`` on the command line or in YAML.
        metrics: Names of the metrics to log; ``None`` for the task's own.
    """

    network_name: ClassVar[str] = "model"
    """The attribute that holds the network."""

    metric_names: ClassVar[tuple[str, ...]] = ()
    """The metrics that the task logs if none are requested."""

    known_metrics: ClassVar[tuple[str, ...]] = ()
    """The metrics that may be requested."""

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        metrics: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.metrics = tuple(self.metric_names if metrics is None else metrics)
        for name in self.metrics:
            if name not in self.known_metrics:
                near = nearest(name, list(self.known_metrics), n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise InputError(
                    f"{type(self).__name__} has no metric {name!r}{hint}; it has {', '.join(self.known_metrics)}."
                )

    def build_metrics(self, num_labels: int | None = None) -> None:
        """Create the metrics of the validation and of the test."""
        scores = make_metrics(self.metrics, num_labels, getattr(self, "multi_label", False))
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")

    @property
    def body(self) -> nn.Module:
        """The network that the methods adapt."""
        return self.get_submodule(self.network_name)

    @property
    def fresh_modules(self) -> list[str]:
        """Modules without pretrained weights, such as a new head. Methods train them in full."""
        return [f"{self.network_name}.{name}" for name in fresh_modules(self.body) if name]

    @property
    def max_positions(self) -> int | None:
        """The number of tokens that the network has positions for; None if it has no limit."""
        count = getattr(getattr(self.body, "config", None), "max_position_embeddings", None)
        if not isinstance(count, int) or count < 1:
            return None
        # RoBERTa numbers its positions from the padding index on, so it has fewer than its table has rows.
        tables = [m for m in self.body.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == count]
        first = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
        return count - first

    def setup(self, stage: str) -> None:
        """Check before training that callbacks monitor metrics that the task logs.

        Raises:
            InputError: if a callback monitors a name that is not logged.
        """
        logged = {f"{part}/{name}" for part in ("val", "test") for name in ("loss", *self.logged())} | {"train/loss"}
        for callback in self.trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            name = getattr(callback, "monitor", None)
            name = name.removesuffix("_epoch").removesuffix("_step") if isinstance(name, str) else None
            # Subclasses and callbacks may log further names, but an unknown name under one of our prefixes is a
            # mistake.
            if name is not None and name not in logged and name.startswith(("train/", "val/", "test/")):
                near = nearest(name, sorted(logged), n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise InputError(
                    f"{type(callback).__name__} monitors {name!r}{hint}, but {type(self).__name__} logs "
                    f"{', '.join(sorted(logged))}."
                )

    def logged(self) -> Sequence[str]:
        """The names under which the metrics are logged; a subclass that logs others adds them."""
        return self.metrics

    def compute(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the mean loss of a batch, and what :meth:`update` needs."""
        raise NotImplementedError

    def update(self, scores: Any, output: Any, batch: Batch) -> None:
        """Update the metrics with a batch."""

    def weight(self, batch: Batch) -> int:
        """The number of predictions in a batch; it weights the batch's loss in the mean over batches."""
        return len(batch["labels"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, and log ``train/loss``."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and the metrics under ``val/``."""
        self._score(batch, "val", self.val_scores)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and the metrics under ``test/``."""
        self._score(batch, "test", self.test_scores)

    def prediction_columns(self, output: Any, batch: Batch) -> dict[str, list[Any] | Tensor]:
        """The columns that ``predict`` writes for a batch, from what :meth:`predict_step` returned."""
        return {"prediction": list(output)}

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, with a linear warmup and decay."""
        return adamw(self, self.hparams["lr"], self.hparams["weight_decay"], self.hparams["warmup"])

    def adapters_of(self, batch: Batch) -> Any:
        """Run the adapter that each row of the batch names."""
        return rows(self, batch.get("adapters"))

    def _step(self, batch: Batch, stage: str) -> tuple[Tensor, Any]:
        with self.adapters_of(batch):
            loss, output = self.compute(batch)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=max(1, self.weight(batch)))
        return loss, output

    def _score(self, batch: Batch, stage: str, scores: Any) -> None:
        _, output = self._step(batch, stage)
        self.update(scores, output, batch)
        if len(scores):
            self.log_dict(scores, prog_bar=True, batch_size=max(1, self.weight(batch)))


class Classifier(Task):
    """A task with labels. Their number and names come from the data, unless the user gives them.

    A subclass names the ``auto_class`` of transformers that loads its network, or overrides :meth:`create`.

    Attributes:
        labels: The names of the labels in the order of the network's outputs; empty until they are known.
        num_labels: The number of the network's outputs.
        multi_label: Whether an example may have several labels.
    """

    #: arguments that the data determine; a default in a saved configuration does not override a checkpoint's value
    from_data: ClassVar[tuple[str, ...]] = ("labels", "num_labels", "multi_label")

    auto_class: ClassVar[str]
    number_name: ClassVar[str] = "num_labels"
    """The argument with the number of labels."""

    labels: list[str]
    num_labels: int
    multi_label: bool = False

    def build(self, num_labels: int | None, labels: Sequence[str] | None) -> None:
        """Create the network and the metrics in ``__init__``.

        Raises:
            InputError: if ``labels`` and ``num_labels`` differ in number.
        """
        if labels and num_labels is not None and len(labels) != num_labels:
            raise InputError(f"{self.number_name}={num_labels}, but labels names {len(labels)}: pass only labels.")
        self.labels = [str(label) for label in labels or ()]
        self.create(len(labels) if labels else num_labels)

    def create(self, num_labels: int | None) -> None:
        """Load the network with ``num_labels`` outputs (None for its own number), and call :meth:`created`."""
        import transformers

        given = self.hparams
        changes = {**(given.get("config") or {}), **({} if num_labels is None else {"num_labels": num_labels})}
        self.model: Any = None  # frees the memory of the earlier network
        kind = getattr(transformers, self.auto_class)
        self.model = load_model(kind, given["model"], given["pretrained"], given["dtype"], **changes)
        self.num_labels = self.model.config.num_labels
        self.created()

    def created(self) -> None:
        """Create the metrics; name the outputs, or take their names from the network's configuration."""
        self.build_metrics(self.num_labels)
        names = dict(getattr(getattr(self.body, "config", None), "id2label", None) or {})
        if not self.labels and names and names != {i: f"LABEL_{i}" for i in names}:
            self.labels = [str(name) for name in names.values()]
        self.name_outputs()

    def setup(self, stage: str) -> None:
        """Take the labels from the data.

        Raises:
            InputError: if the user gave a different number of labels, or adapters were applied before the number was
                known.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        labels = (
            getattr(data, "classes", None) or getattr(data, "labels", None) or ()
        )  # ImageData's labels are an array
        found = [] if isinstance(labels, str) else [str(label) for label in labels]
        if not found or found == self.labels:
            return
        shown = f"{len(found)} ({', '.join(found[:5])}{', …' if len(found) > 5 else ''})"
        multi = bool(getattr(data, "multi_label", False))
        named, number = self.hparams.get("labels"), self.hparams.get(self.number_name)
        # Labels that only the network's configuration has are replaced; labels that the user gave must agree.
        if (number and len(found) != number) or (named and [str(label) for label in named] != found):
            raise InputError(
                f"the model has {self.num_labels} classes, but the data has {shown}: "
                f"pass {self.number_name}={len(found)} to {type(self).__name__}."
            )
        if len(found) != self.num_labels or multi != self.multi_label:
            if next(hosts(self), None) is not None:
                raise InputError(
                    f"the data has {shown}, but the model has adapters and {self.num_labels} outputs already: "
                    f"pass {self.number_name}={len(found)} to {type(self).__name__} before applying methods."
                )
            self.multi_label, self.labels = multi, found
            self.create(len(found))
        self.labels = found
        self.hparams.update({"labels": found, self.number_name: None}, **({"multi_label": multi} if multi else {}))
        self.name_outputs()

    def name_outputs(self) -> None:
        """Write the labels' names into the network's configuration, so that an exported model answers with them."""
        config = getattr(self.body, "config", None)
        if self.labels and config is not None and hasattr(config, "id2label"):
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}

    def names(self) -> list[str]:
        """The name of each output; its number if it has none."""
        return self.labels or [str(number) for number in range(self.num_labels)]

    def label_columns(self, probabilities: Tensor) -> Mapping[str, list[Any]]:
        """The columns ``label`` and ``probability`` for probabilities ``(batch, labels)``."""
        names = self.names()
        if self.multi_label:
            chosen = [[i for i, p in enumerate(row) if p >= 0.5] for row in probabilities.tolist()]
            return {
                "label": ["|".join(names[i] for i in found) for found in chosen],
                "probability": [
                    "|".join(f"{row[i]:.4f}" for i in found) for row, found in zip(probabilities.tolist(), chosen)
                ],
            }
        values, numbers = probabilities.float().max(-1)
        return {"label": [names[i] for i in numbers.tolist()], "probability": [round(v, 6) for v in values.tolist()]}


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The arguments of the network in a batch: every tensor except the labels."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of logits ``(batch, labels)``: cross entropy, or for several labels binary cross entropy."""
    if labels.ndim == logits.ndim:
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return torch.nn.functional.cross_entropy(logits.float(), labels)
