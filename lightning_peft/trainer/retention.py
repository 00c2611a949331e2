"""Measure during a run how far the adapted model has moved from its base on data like those that the base was trained
on.

    kl = mean over positions of KL(p_base || p_adapted) = sum_y p_base(y) (log p_base(y) - log p_adapted(y)),  in nats

For a classifier, positions are the rows; for a sequence, they are the tokens whose label is not ignored.

The base is the same model with its adapters disabled, so no second copy is in memory. If a method trains parameters of
the base in place (a head, biases, everything), disabling adapters does not restore them. The base's outputs are then
computed once, before training, and kept: in memory, and in checkpoints for an exact resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_peft.core.names import listed
from lightning_peft.core.record import injected_module, injection_state, trainable_parameters
from lightning_peft.core.switching.active import disabled
from lightning_peft.core.targeting.base_modules import base_parameters

__all__ = ["Retention", "build_data"]

#: the logits of a batch (..., classes), or features (..., width) for ``distance="cosine"``
ForwardFn = Callable[[L.LightningModule, Any], Tensor]


class Retention(Callback):
    """Logs how far the adapted model diverges from its base on held-back data, and can stop the run at a limit.

    Logs ``retention/kl`` (or ``retention/cosine``) at the end of validations, and at the end of the training. If the
    batches have labels, it also logs ``retention/loss``, and its difference from the base's loss as
    ``retention/loss_change``. Callbacks may monitor these names. The measurement does not change the run: it restores
    modes and random states.

    Args:
        data: data of the kind that the base was trained on: a LightningDataModule (its validation data are used), an
            iterable of batches such as a DataLoader, or, in YAML, ``class_path`` and ``init_args`` of a
            LightningDataModule.
        batches: the number of batches that are measured.
        every_n_validations: measure at the end of every n-th validation.
        limit: stop the run if the divergence is above this. None never stops it.
        distance: ``"kl"`` compares distributions over classes or tokens; ``"cosine"`` compares features, as 1 minus
            the cosine of base and adapted features.
        forward_fn: called with the module and a batch on the module's device; returns logits ``(..., classes)`` or, for
            ``"cosine"``, features ``(..., width)``. By default, the tasks of this package compute a batch as in
            validation. Other modules are called with a mapping as keyword arguments (without ``labels`` if the forward
            does not take them), or with the first entry of a tuple, whose second entry holds the labels; the output
            must be a tensor or have ``logits``.

    Attributes:
        last: the values of the last measurement, by name without ``retention/``.

    Raises:
        MisconfigurationException: when a fit starts, if there are no batches; if the output is not a tensor of at least
            two logits per position; or if the module's head has no pretrained weights, so that the base has no
            distribution to keep, and no ``forward_fn`` is given.
        ValueError: if an argument is not valid.

    Example::

        from lightning_peft.data import LanguageModelData

        stories = LanguageModelData("stories.txt", tokenizer="my/model")
        trainer = L.Trainer(callbacks=[lp.LoRA(), lp.Retention(stories, limit=0.5)])
    """

    def __init__(
        self,
        # A mapping comes first, because LightningCLI would build a second DataModule with the arguments of --data.
        data: Mapping[str, Any] | L.LightningDataModule | Iterable[Any],
        batches: int = 16,
        every_n_validations: int = 1,
        limit: float | None = None,
        distance: Literal["kl", "cosine"] = "kl",
        forward_fn: ForwardFn | None = None,
    ) -> None:
        super().__init__()
        if batches < 1 or every_n_validations < 1:
            raise ValueError(f"batches={batches} and every_n_validations={every_n_validations} must be at least 1")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit={limit} must be above 0")
        if distance not in ("kl", "cosine"):
            raise ValueError(f"distance={distance!r} is unknown: use 'kl' or 'cosine'")
        self.data = build_data(data) if isinstance(data, Mapping) else data
        self.batches, self.every_n_validations = batches, every_n_validations
        self.limit, self.distance, self.forward_fn = limit, distance, forward_fn
        self.last: dict[str, float] = {}
        self._batches: list[Any] = []
        self._kept: list[Tensor] | None = None  # the base's outputs, if disabling adapters does not restore the base
        self._base_loss: float | None = None
        self._validations = 0
        self._measured_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validations, self._measured_at = 0, -1
        self.check(pl_module)
        with isolate_rng():
            self._batches = list(islice(self._source(trainer), self.batches))
        if not self._batches:
            raise MisconfigurationException("Retention: data has no batches: give validation data, or a DataLoader")
        if self._kept is not None:  # restored from the run that this one continues
            return
        outputs, losses = [], []
        keep = _changes_base(pl_module)
        with _measuring(trainer, pl_module), disabled(pl_module):
            for batch in self._on_device(trainer, pl_module):
                output, loss = self._forward(pl_module, batch)
                _check(output, self.distance)
                outputs += [_normalised(output, self.distance).cpu()] if keep else []
                losses.append(loss)
        self._kept = outputs if keep else None
        self._base_loss = _mean(losses)

    def check(self, module: nn.Module) -> None:
        """Refuse a base that has no distribution to retain.

        Raises:
            MisconfigurationException: if a head has no pretrained weights, and there is no ``forward_fn``.
        """
        fresh = list(getattr(module, "fresh_modules", ()))
        if fresh and self.forward_fn is None:
            raise MisconfigurationException(
                f"Retention: {listed(fresh)} has no pretrained weights, so the base's distribution over its outputs is "
                "random and there is nothing to retain. Pass forward_fn, which returns an output of the pretrained "
                "part, with distance='cosine' for features"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            found = self.measure(trainer, pl_module)
            pl_module.log_dict(
                {f"retention/{name}": value for name, value in found.items()}, rank_zero_only=True, batch_size=1
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._measured_at != trainer.global_step:
            found = self.measure(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics({f"retention/{name}": v for name, v in found.items()}, step=trainer.global_step)

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """Compare the module as it is now with its base, and stop the run if the limit is exceeded.

        Returns:
            ``kl`` or ``cosine``, and with labels ``loss`` and ``loss_change``.
        """
        total, count, losses = 0.0, 0, []
        with _measuring(trainer, module):
            for i, batch in enumerate(self._on_device(trainer, module)):
                output, loss = self._forward(module, batch)
                if self._kept is None:
                    with disabled(module):
                        base = _normalised(self._forward(module, batch)[0], self.distance)
                else:
                    base = self._kept[i].to(output.device)
                distances = _distances(base, _normalised(output, self.distance), self.distance)
                kept = _positions(batch, distances)
                total, count = total + float(distances[kept].sum()), count + int(kept.sum())
                losses.append(loss)
        value, loss = total / max(1, count), _mean(losses)
        self.last = {self.distance: value}
        if loss is not None and self._base_loss is not None:
            self.last |= {"loss": loss, "loss_change": loss - self._base_loss}
        self._measured_at = trainer.global_step
        if self.limit is not None and not value <= self.limit:
            trainer.should_stop = True
            rank_zero_warn(
                f"Retention: retention/{self.distance} is {value:.4g} at step {trainer.global_step}, above "
                f"limit={self.limit:g}, so the run stops. Use a lower learning rate or rank to stay closer to the "
                f"base"
            )
        return dict(self.last)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._kept is None else {"base": self._kept, "base_loss": self._base_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "base" in state_dict:
            self._kept, self._base_loss = list(state_dict["base"]), state_dict["base_loss"]

    def _source(self, trainer: L.Trainer) -> Iterator[Any]:
        if not isinstance(self.data, L.LightningDataModule):
            return iter(self.data)
        self.data.trainer = trainer  # our DataModules take the tokenizer from its module
        self.data.prepare_data()
        self.data.setup("validate")
        loaders = self.data.val_dataloader()
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        return (batch for loader in (loaders if isinstance(loaders, list | tuple) else [loaders]) for batch in loader)

    def _on_device(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Any]:
        return (trainer.strategy.batch_to_device(batch, module.device) for batch in self._batches)

    def _forward(self, module: L.LightningModule, batch: Any) -> tuple[Tensor, float | None]:
        """The output of a batch, and its loss if it has labels."""
        if self.forward_fn is not None:
            return self.forward_fn(module, batch), None
        output, loss = _default_forward(module, batch)
        return output, None if loss is None else float(loss)


def build_data(config: Mapping[str, Any]) -> L.LightningDataModule:
    """Build a DataModule from ``class_path`` and ``init_args``, as LightningCLI does.

    Raises:
        ValueError: if the class does not exist, or an argument does not fit it.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=L.LightningDataModule)
    try:
        data: L.LightningDataModule = parser.instantiate_classes(parser.parse_object({"data": dict(config)})).data
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{config} does not describe a LightningDataModule: {error}") from error
    return data


def _default_forward(module: Any, batch: Any) -> tuple[Any, Any]:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if callable(getattr(module, "compute", None)) and labels is not None:  # a task of this package
        loss, output = module.compute(batch)
        return output, loss
    if isinstance(batch, Mapping):
        try:
            output = module(**batch)
        except TypeError:
            output = module(**{name: value for name, value in batch.items() if name != "labels"})
    elif isinstance(batch, list | tuple):
        output, labels = module(batch[0]), batch[1] if len(batch) > 1 else None
    else:
        output = module(batch)
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", output)
    if loss is None and isinstance(labels, Tensor) and isinstance(logits, Tensor) and labels.ndim == 1:
        classes = not labels.is_floating_point() and labels.shape == logits.shape[:-1]
        loss = nn.functional.cross_entropy(logits.float(), labels) if classes else None
    return logits, loss


def _changes_base(module: L.LightningModule) -> bool:
    """Whether training changes the base itself, so that disabling adapters does not restore it."""
    record = injection_state(module)
    if record is None or any(method.train_norm_stats for method in record.methods.values()):
        return True
    base = {id(p) for _, p in base_parameters(injected_module(module))}
    return any(id(p) in base for p in trainable_parameters(module))


def _check(output: Any, distance: str) -> None:
    if not isinstance(output, Tensor) or output.ndim < 2 or (distance == "kl" and output.shape[-1] < 2):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise MisconfigurationException(
            f"Retention: the output for a batch is {shape}, but distance={distance!r} needs a tensor (..., classes) "
            "with a distribution in its last dimension. Pass forward_fn, which returns one"
        )


def _normalised(output: Tensor, distance: str) -> Tensor:
    return output.float().log_softmax(-1) if distance == "kl" else nn.functional.normalize(output.float(), dim=-1)


def _distances(base: Tensor, now: Tensor, distance: str) -> Tensor:
    """The distance at every position; the last dimension is summed."""
    return (base.exp() * (base - now)).sum(-1) if distance == "kl" else 1 - (base * now).sum(-1)


def _positions(batch: Any, distances: Tensor) -> Tensor:
    """True for every position that counts: those whose label is not ignored, or else those that are not padding."""
    for name, left_out in (("labels", -100), ("attention_mask", 0)) if isinstance(batch, Mapping) else ():
        value = batch.get(name)
        if isinstance(value, Tensor) and value.shape == distances.shape and distances.ndim > 1:
            return value != left_out
    return torch.ones_like(distances, dtype=torch.bool)


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


@contextmanager
def _measuring(trainer: L.Trainer, module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, in the run's precision; modes and random states are restored."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
