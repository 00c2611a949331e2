"""The callback that logs how a fit changes its adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_peft.core.record import injection_state
from lightning_peft.core.targeting.base_modules import holds_shards
from lightning_peft.trainer.logs import keys
from lightning_peft.trainer.logs.artifacts import log_adapters
from lightning_peft.trainer.logs.loggers import log_figure, log_metrics, logging_step
from lightning_peft.trainer.logs.norms import Norms, Updates
from lightning_peft.trainer.logs.throughput import Throughput, peak_memory
from lightning_peft.trainer.strategy import partitions_optimizers

__all__ = ["AdapterMonitor"]


class AdapterMonitor(Callback):
    """Logs throughput, memory, and the gradients, updates and ranks of each adapter, to every logger of the Trainer.

    A fit with a method and a logger gets this callback with its default arguments; add it yourself to change them. Rank
    0 measures and logs. The methods' configurations and the parameter counts are always logged. docs/logging.md lists
    all values with their names and units; :mod:`lightning_peft.trainer.logs.keys` has the names.

    Args:
        every_n_steps: log every n-th optimizer step; None takes the Trainer's ``log_every_n_steps``.
        throughput: log samples and tokens per second, and the time per step.
        memory: log the peak memory.
        norms: log the norms of gradients and steps, and the relative updates.
        ranks: log effective ranks, AdaLoRA's allocation and DyLoRA's rank.
        plots: log the plots that methods have, such as AdaLoRA's ranks; requires matplotlib.
        artifacts: upload the adapters at the end of the fit to loggers that store artifacts (W&B, MLflow).
        batch_size_fn: returns the number of samples of a batch. None takes the first size of its first tensor.

    Raises:
        MisconfigurationException: if an argument is invalid, or the fit has no adapters.

    Example::

        from lightning.pytorch.loggers import CSVLogger

        monitor = lp.AdapterMonitor(every_n_steps=10, memory=False)
        trainer = L.Trainer(callbacks=[lp.LoRA(r=8), monitor], logger=CSVLogger("runs"))
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        throughput: bool = True,
        memory: bool = True,
        norms: bool = True,
        ranks: bool = True,
        plots: bool = True,
        artifacts: bool = True,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise MisconfigurationException(
                f"AdapterMonitor: every_n_steps must be an integer of at least 1, got {every_n_steps!r}. None takes "
                "the Trainer's log_every_n_steps"
            )
        self.every_n_steps = every_n_steps
        self.throughput, self.memory, self.norms, self.ranks = throughput, memory, norms, ranks
        self.plots, self.artifacts, self.batch_size_fn = plots, artifacts, batch_size_fn
        self.added_by_default = False
        self._clock: Throughput | None = None
        self._norms: Norms | None = None
        self._updates: Updates | None = None
        self._stepped = False
        self._explained = False  # whether the unknown batch size was reported
        self._logs = False  # whether this process measures and logs in this fit

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if injection_state(pl_module) is None:
            raise MisconfigurationException(
                "AdapterMonitor: the model has no adapters to monitor. Add a method to the Trainer's callbacks, such "
                "as lp.LoRA()"
            )
        if not trainer.loggers:
            rank_zero_warn("AdapterMonitor logs nothing, because the Trainer has logger=False: give it a logger")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logs = bool(trainer.loggers) and trainer.is_global_zero
        self._clock = self._norms = self._updates = None
        self._stepped = self._explained = False
        if not self._logs:
            return
        if self.throughput:
            self._clock = Throughput(self.batch_size_fn)
        self._start_memory(pl_module.device)
        if not (self.norms or self.ranks):
            return
        if holds_shards(pl_module) or partitions_optimizers(trainer.strategy):
            rank_zero_info(
                "the norms and effective ranks of the adapters are not logged, because the strategy shards parameters "
                "or optimizer states"
            )
        else:
            self._norms = Norms(pl_module) if self.norms else None
            self._updates = Updates(pl_module)

    def _start_memory(self, device: torch.device) -> None:
        if self.memory and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self.memory and peak_memory(device) is None:
            rank_zero_info(f"{keys.PEAK.name} is not logged, because the peak memory of {device.type} is not known")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._stepped = True
        if self._norms is not None and self._due(trainer):
            self._norms.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._stepped = self._stepped, False
        if self._clock is not None:
            self._clock.count(batch, stepped)
            if not self._clock.known and not self._explained:
                self._explain(batch)
        if self._logs and stepped and self._due(trainer):
            log_metrics(trainer, self._measure(trainer, pl_module))

    def _due(self, trainer: L.Trainer) -> bool:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (logging_step(trainer) + 1) % every == 0  # the same steps as Lightning's

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        values = self._norms.after_steps() if self._norms is not None else {}
        if self._updates is not None:
            values |= self._updates.measure(self.norms, self.ranks)
        values |= self._method_values(module)
        if self.memory and (peak := peak_memory(module.device)) is not None:
            values[keys.PEAK.name] = peak / 1e9
        if self._clock is not None:
            values |= self._clock.take((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
        return values

    def _method_values(self, module: L.LightningModule) -> dict[str, float]:
        record = injection_state(module)
        if not self.ranks or record is None:
            return {}
        found: dict[str, float] = {}
        for method in record.methods.values():
            found |= getattr(method, "log_values", lambda model: {})(module)
        return found

    def _explain(self, batch: Any) -> None:
        self._explained = True
        rank_zero_info(
            f"{keys.SAMPLES.name} is not logged, because the number of samples in a {type(batch).__name__} is not "
            "known: pass AdapterMonitor(batch_size_fn=...)"
        )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._clock is not None:
            self._clock.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._clock is not None and not trainer.sanity_checking:
            self._clock.resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._logs:
            return
        log_metrics(trainer, self._method_values(pl_module))  # the final ranks
        record = injection_state(pl_module)
        if self.plots and record is not None and importlib.util.find_spec("matplotlib") is not None:
            for method in record.methods.values():
                for name, figure in getattr(method, "log_figures", lambda model: {})(pl_module).items():
                    log_figure(trainer, name, figure)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.artifacts and injection_state(pl_module) is not None:
            log_adapters(trainer, pl_module, say=not self.added_by_default)
