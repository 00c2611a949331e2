"""The description of one test case: a model of another package and how to train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from tests.integration.skeletons import seeded

#: one method of each family, by its name on the page
METHODS: Mapping[str, Callable[..., lp.PEFTMethod]] = {
    "LoRA": lambda **options: lp.LoRA(**{"r": 2, "seed": 0, **options}),
    "SSF": lp.SSF,
    "BitFit": lp.BitFit,
}
MERGED = ("LoRA", "SSF")  # methods that can be merged into the weights


@dataclass(frozen=True)
class Case:
    """A model of a package, in a LightningModule that learns to return ones.

    Attributes:
        package: the package's name on the index.
        build: makes the model; imports the package.
        batch: makes the arguments of the model's forward.
        options: the arguments that a method needs on this model, by method.
        refused: what the error says of a method that cannot work on this model.
        result: takes the tensor out of what the forward returns.
        plain_hyperparameters: whether a checkpoint holds tensors and plain values only.
        pl: Lightning's package that the module is written for.
    """

    package: str
    build: Callable[[], Any]
    batch: Callable[[], Any]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    result: Callable[[Any], Tensor] = lambda out: out
    plain_hyperparameters: bool = True
    pl: ModuleType = pl

    def module(self) -> Any:
        """Build the LightningModule, always with the same weights."""
        return Wrapped(seeded(self.build), self.result)

    def method(self, name: str) -> lp.PEFTMethod:
        return METHODS[name](**self.options.get(name, {}))

    def loader(self) -> DataLoader:
        """A loader that returns the same batch three times."""
        return DataLoader([self.batch()] * 3, batch_size=None)

    @torch.no_grad()
    def output(self, module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return module.eval()(*self.batch())

    def load(self, path: Path) -> Any:
        """Build a new module from the checkpoint."""
        module = self.module()
        return lp.load_from_checkpoint(Wrapped, path, model=module.model, result=self.result)


@dataclass(frozen=True)
class Own(Case):
    """A LightningModule of a package, with its own steps and optimizer.

    Attributes:
        batches: makes three batches for its ``training_step``.
        arguments: the arguments of the class that are objects, which files never build.
    """

    batches: Callable[[], Iterable[Any]] = list
    arguments: Callable[[Any], Mapping[str, Any]] = lambda module: {}

    def module(self) -> Any:
        return seeded(self.build)

    def loader(self) -> DataLoader:
        return DataLoader(list(self.batches()), batch_size=None, collate_fn=lambda batch: batch)

    @torch.no_grad()
    def output(self, module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        batch = self.batch()
        return self.result(module.eval()(**batch) if isinstance(batch, dict) else module.eval()(*batch))

    def load(self, path: Path) -> Any:
        new = self.arguments(self.module())
        plain = self.plain_hyperparameters
        return seeded(lambda: lp.load_from_checkpoint(type(self.module()), path, weights_only=plain, **new))


class Wrapped(pl.LightningModule):
    def __init__(self, model: nn.Module, result: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.result = model, result

    def forward(self, *batch: Any) -> Tensor:
        return self.result(self.model(*batch))

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        return (self(*batch) - 1).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-2)
