"""The base class of every method: a Lightning callback that freezes a model and adds a few trainable parameters."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from attrs import field
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_peft.core.names import check_name, listed
from lightning_peft.core.registry import register_method
from lightning_peft.core.state.plan import Plan, init_device
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.patterns import (
    TargetError,
    as_patterns,
    bare_parameters,
    match,
    match_modules,
    match_parameters,
    no_match,
)
from lightning_peft.methods.families.declared import Declared, target_patterns
from lightning_peft.trainer.prepare_run import prepare_run

__all__ = ["PEFTMethod"]


class PEFTMethod(Declared, Callback, ABC):
    """A method of parameter-efficient fine-tuning as a Lightning callback.

    Attach it to a Trainer (``Trainer(callbacks=[lp.LoRA(r=8)])``) or apply it by hand (``lp.apply(model, method)``).
    The base is frozen. The parameters that the method adds or selects, and the modules in ``trainable``, train, and
    checkpoints hold only these.

    A subclass declares its arguments as fields and implements :meth:`plan`. Most methods derive from a family instead,
    such as :class:`lightning_peft.WeightMethod`.

    Args:
        targets: what to adapt: ``"all-linear"`` (every linear-like layer except the output head) or patterns: a name or
            its ending, a glob, ``re:<regular expression>`` or ``type:<class name>``.
        exclude: patterns to exclude from ``targets``.
        trainable: patterns of modules that train in full, for example heads. A pattern that matches no module may name
            single parameters (``logit_scale``, ``cls_token``).
        name: the adapter's name, unique in a model.
        seed: seed for adapter initialisation; the same seed gives identical adapters on every rank. None takes the seed
            of Lightning's ``seed_everything``, or 0. ``torch.manual_seed`` has no effect on it.
        adapter_dtype: dtype in which adapters are stored and trained; they compute in the dtype of the activations.
        train_norm_stats: update the running statistics of frozen norm layers during training.
        audit: what to do if a check finds an adapter that does not run or does not learn: ``"error"``, ``"warn"`` or
            ``"off"``.

    Raises:
        ValueError: if an argument is invalid.
        TargetError: if a pattern is malformed.

    Example::

        methods = [lp.LoRA(r=8, trainable=["classifier"]), lp.PrefixTuning(10, name="prefix")]
        assert all(isinstance(method, lp.PEFTMethod) for method in methods)
        trainer = L.Trainer(callbacks=methods)
    """

    #: number of trained parameters, per in x out weight at rank r unless it says otherwise; shown in docs/methods.md
    parameter_count: ClassVar[str] = ""
    #: arguments that may differ between the run that saved a state and the run that loads it
    resume_may_differ: ClassVar[frozenset[str]] = frozenset(
        {"targets", "exclude", "trainable", "seed", "adapter_dtype", "train_norm_stats", "audit"}
    )

    targets: str | Sequence[str] = field(default="all-linear", converter=target_patterns)
    exclude: str | Sequence[str] = field(default=(), converter=target_patterns)
    trainable: str | Sequence[str] = field(default=(), converter=target_patterns)
    name: str = field(default="default", validator=lambda _, __, name: check_name(name))
    seed: int | None = None
    adapter_dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    train_norm_stats: bool = False
    audit: Literal["error", "warn", "off"] = "error"

    _run_seed = cast("int | None", None)  # the seed that this fit began with; not an argument

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_method(cls)

    @abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """Plan the changes to ``model`` without making them.

        Raises:
            TargetError: if a pattern matches nothing.
        """
        raise NotImplementedError

    def configure_param_groups(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Change the optimizer's parameter groups; methods with their own learning rates override this.

        It is called once, after frozen parameters have been removed. Split groups must keep their options.
        """

    def log_values(self, model: nn.Module) -> dict[str, float]:
        """Values to log during training, by name; methods whose ranks change override this."""
        return {}

    def log_figures(self, model: nn.Module) -> dict[str, Any]:
        """Matplotlib figures to log at the end of the training, by name."""
        return {}

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}:{self.name}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._run_seed = None
            self._run_seed = self._seed()  # a resumed run later replaces it by the seed of the run that it continues
        prepare_run(trainer, pl_module)

    def trainable_modules(self, model: nn.Module) -> list[str]:
        """The names of the modules that ``trainable`` trains in full, and those without pretrained weights.

        A model names the latter in an attribute ``fresh_modules``, as the tasks do. Frozen, they would stay random.

        Raises:
            TargetError: if a pattern of ``trainable`` matches neither a module nor a parameter.
        """
        patterns = as_patterns(self.trainable, "trainable")
        bare = set(self._of_parameters(model))
        found = match_modules(model, [pattern for pattern in patterns if pattern not in bare], "trainable")
        return list(dict.fromkeys([*found, *getattr(model, "fresh_modules", ())]))

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """The names of the parameters matched by the patterns of ``trainable`` that match no module."""
        return [name for names in self._of_parameters(model).values() for name in names]

    def _of_parameters(self, model: nn.Module) -> dict[str, list[str]]:
        modules = {name: module for name, module in base_modules(model) if name}
        found = {}
        for pattern in as_patterns(self.trainable, "trainable"):
            if any(match(pattern, name, module) for name, module in modules.items()):
                continue
            found[pattern] = match_parameters(model, pattern)
            if not found[pattern]:
                raise TargetError(f"trainable: {no_match(pattern, {**modules, **bare_parameters(model)})}")
        return found

    def start_plan(self, model: nn.Module) -> Plan:
        """A new plan that trains the modules and parameters in ``trainable``.

        Raises:
            TargetError: if a pattern of ``trainable`` matches nothing, or only modules without parameters.
        """
        heads = self.trainable_modules(model)
        empty = [name for name in heads if not any(True for _ in model.get_submodule(name).parameters())]
        if empty and len(empty) == len(heads):
            raise TargetError(f"trainable={self.trainable!r} matches only modules without parameters: {listed(empty)}")
        return Plan(train_modules=heads, train=dict.fromkeys(self.trained_parameters(model), "trains"))

    def seed_for(self, what: object) -> int:
        """A seed for one random draw of this method, derived only from ``seed``, the adapter's name and ``what``.

        A method that draws during training passes the step number. If it also stores ``_seed()`` in its state, as
        DyLoRA does, a resumed run draws the same numbers as an uninterrupted one, whatever seed its environment sets.
        """
        return int.from_bytes(hashlib.sha256(f"{self._seed()}:{self.name}:{what}".encode()).digest()[:7], "big")

    def _seed(self) -> int:
        if self._run_seed is not None:
            return self._run_seed
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @contextmanager
    def seeded_init(self, where: str) -> Iterator[None]:
        """Seed torch while the adapter at ``where`` is initialised, and restore the global random state afterwards.

        Inside, new tensors are on the CPU and in ``adapter_dtype``, even if a strategy has set other defaults. If only
        their number is asked for (:func:`lightning_peft.inspect`), they are on the meta device.
        """
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), init_device():
            torch.random.default_generator.manual_seed(self.seed_for(where))
            torch.set_default_dtype(getattr(torch, self.adapter_dtype))
            try:
                yield
            finally:
                torch.set_default_dtype(before)
