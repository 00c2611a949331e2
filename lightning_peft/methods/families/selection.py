"""The family of selection methods: they train chosen parameters of the base and add none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import lightning as L
import torch
from attrs import field
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.core.names import is_within, join, listed, owner_of, parents
from lightning_peft.core.state.plan import Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.blocks import find_blocks
from lightning_peft.core.targeting.frozen_parts import in_frozen_part, why_frozen
from lightning_peft.core.targeting.packed import is_packed
from lightning_peft.core.targeting.patterns import (
    TargetError,
    as_patterns,
    match,
    match_modules,
    no_match,
    nothing_left,
)
from lightning_peft.core.targeting.selection import select
from lightning_peft.core.targeting.sites import output_head, weight_sites
from lightning_peft.methods.families.arguments import Check, is_number
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.trainer.param_groups import split_groups

__all__ = [
    "SelectionMethod",
    "body_blocks",
    "check_not_packed",
    "depths",
    "head_module",
    "parameters_in",
    "tail_modules",
]


class SelectionMethod(PEFTMethod):
    """Base class of the methods that train parameters of the base; a subclass implements :meth:`choose`.

    Checkpoints hold the chosen parameters, and the frozen ones identify the base. The trained values replace those of
    the base, so merging and ``lp.disabled`` have no effect.

    Args:
        layer_decay: discriminative learning rates (Howard & Ruder 2018, arXiv:1801.06146): the learning rate of a
            parameter is multiplied by ``layer_decay ** depth``. Depth is 0 after the last block, 1 in the last block,
            increases by one per block towards the input, and is largest before the first block. 1 gives all parameters
            the same rate. The optimizer's groups are split, and learning-rate schedulers apply to all of them.

    Example::

        class Gains(lp.SelectionMethod):
            def choose(self, model, plan):
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1 and name.endswith("weight"):
                        plan.train[name] = "trains"

        lp.apply(model, Gains())
    """

    resume_may_differ = PEFTMethod.resume_may_differ | {"layer_decay"}

    targets: str | Sequence[str] = field(default="all", kw_only=False)
    layer_decay: float = field(
        default=1.0, validator=Check("a factor in (0, 1]", lambda value: is_number(value) and 0 < value <= 1)
    )

    @abstractmethod
    def choose(self, model: nn.Module, plan: Plan) -> None:
        """Add the parameters to train to ``plan``, which already contains the modules in ``trainable``."""
        raise NotImplementedError

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        self.choose(model, plan)
        whole = plan.train_modules
        plan.train_modules = [n for n in whole if not is_within(n, *(other for other in whole if other != n))]
        plan.train = {k: what for k, what in plan.train.items() if not is_within(k, *plan.train_modules)}
        parameters = [(n, model.get_parameter(n)) for n in (*plan.train, *plan.deferred)]
        for name in plan.train_modules:
            parameters += [(join(name, n), p) for n, p in model.get_submodule(name).named_parameters()]
        for name, parameter in parameters:
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise TargetError(
                    f"{name} cannot train because it is quantised ({parameter.dtype}): exclude it, or load the model "
                    "unquantised"
                )
        for name in plan.train_modules:
            check_not_packed(model, name)
        plan.notes.append(_share(type(self).__name__, model, parameters))
        return plan

    def patterns(self, keyword: str) -> tuple[str, ...]:
        """The patterns in ``targets``; empty if it is ``keyword``, which lets the method choose."""
        if self.targets == keyword:
            return ()
        if not self.targets:
            raise TargetError(nothing_left(self.targets, self.exclude))
        return as_patterns(self.targets, "targets")

    def covered(self, model: nn.Module, patterns: Iterable[str], argument: str) -> Callable[[str], bool]:
        """Return a predicate on module names: True if a pattern matches the module or one that contains it.

        Raises:
            TargetError: if a pattern matches nothing.
        """
        hits = list(match_modules(model, patterns, argument))
        return lambda name: is_within(name, *hits)

    def add_modules(
        self, model: nn.Module, names: Iterable[str], plan: Plan, left_alone: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Train the modules in ``names``, except parameters inside that match ``exclude`` or ``left_alone``."""
        excluded = self.covered(model, as_patterns(self.exclude, "exclude"), "exclude")
        names = list(names)
        for name in names:
            check_not_packed(model, name, lambda n: excluded(n) or left_alone(n))
            parameters = parameters_in(model, name)
            kept = {n: p for n, p in parameters.items() if not excluded(owner_of(n)) and not left_alone(n)}
            if len(kept) == len(parameters) and kept:
                plan.train_modules += [name] if name not in plan.train_modules else []
            else:
                plan.train |= dict.fromkeys(kept, "trains")
        if names and not plan.train and not plan.train_modules:
            raise TargetError(f"{type(self).__name__}: exclude={self.exclude!r} excludes everything that would train")

    def blocks(self, model: nn.Module) -> list[str]:
        """The names of the targeted blocks, in the order in which they run.

        Raises:
            TargetError: if a pattern matches nothing, or one target is inside another.
        """
        patterns = self.patterns("blocks")
        if not patterns:
            return body_blocks(model)
        names = list(match_modules(model, patterns, "targets"))
        for name in names:
            for other in names:
                if name != other and is_within(name, other):
                    raise TargetError(
                        f"targets: {name!r} is inside {other!r}, which is also a target: remove one of them"
                    )
        return names

    def matching(self, model: nn.Module, accept: Callable[[nn.Module, str, nn.Parameter], bool]) -> dict[str, str]:
        """The parameters inside ``targets`` for which ``accept`` returns True, each with its owner module's name.

        Raises:
            TargetError: if a pattern matches nothing or no module with such a parameter, or everything is excluded.
        """
        every = {
            join(name, key): name
            for name, module in base_modules(model)
            for key, value in module._parameters.items()
            if value is not None and accept(module, key, value)
        }
        if not every and self.targets == "all":
            return {}
        modules = {name: module for name, module in base_modules(model) if name}
        left_alone = in_frozen_part(model)

        def inside(pattern: str) -> list[str]:
            around = [name for name, module in modules.items() if match(pattern, name, module)]
            return [key for key, name in every.items() if is_within(name, *around)]

        def everything() -> list[str]:
            free = [key for key in every if not left_alone(key)]
            if not free:
                raise TargetError(nothing_left(self.targets, self.exclude) + why_frozen(model))
            return free

        def missing(pattern: str) -> str:
            if not any(match(pattern, name, module) for name, module in modules.items()):
                return no_match(pattern, modules)
            near = no_match(pattern, {name: modules[name] for name in every.values() if name}).partition("; ")[2]
            return f"{pattern!r} names no parameter that {type(self).__name__} trains; {near}"

        found = select(
            modules,
            self.targets,
            self.exclude,
            {"all": everything},
            candidates=inside,
            places=lambda key: (every[key],),
            missing=missing,
        )
        return {key: name for key, name in every.items() if key in found}

    def configure_param_groups(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if self.layer_decay == 1:
            return
        found = depths(model, self.trainable_modules(model))
        scale: dict[int, float] = {}
        for name, depth in found.items():
            key = id(model.get_parameter(name))  # a tied weight gets the rate of its deepest module
            scale[key] = min(scale.get(key, 1.0), self.layer_decay**depth)
        # Parameters of adapters are not part of the base and keep their rate.
        split_groups(optimizer, lambda p: {"lr_scale": scale[id(p)]} if id(p) in scale else {})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        low = {p.dtype for _, m in base_modules(pl_module) for p in m.parameters(recurse=False) if p.requires_grad}
        for dtype in low & {torch.bfloat16, torch.float16}:
            rank_zero_warn(
                f"{type(self).__name__} trains parameters of the base in {dtype}, where small updates are rounded "
                "away: load the base in float32 and use Trainer(precision='bf16-mixed')"
            )


def check_not_packed(model: nn.Module, name: str, left_out: Callable[[str], bool] = lambda name: False) -> None:
    """Check that no weight in the module ``name`` is packed in a way that its parameters do not show.

    Args:
        model: any module.
        name: a module of it.
        left_out: whether a module inside, by its name in ``model``, does not train.

    Raises:
        TargetError: if such a weight would train.
    """
    inside = [(join(name, n), part) for n, part in base_modules(model.get_submodule(name)) if is_packed(part)]
    hidden = [(n, part) for n, part in inside if all(p.is_floating_point() for p in part.parameters(recurse=False))]
    if packed := [n for n, _ in hidden if not left_out(n)]:
        raise TargetError(
            f"{listed(packed)} cannot train because the weight is quantised: exclude it, or load the model unquantised"
        )


def _share(method: str, model: nn.Module, chosen: Iterable[tuple[str, nn.Parameter]]) -> str:
    """A note with the percentage of the base's parameters that train."""
    trains = {id(p): p.numel() for _, p in chosen}
    total = sum(p.numel() for p in {id(p): p for p in parameters_in(model, "").values()}.values())
    return f"{method} trains {100 * sum(trains.values()) / max(total, 1):.3g} % of the base"


def depths(model: nn.Module, heads: Iterable[str] = ()) -> dict[str, int]:
    """The depth of each parameter of the base: 0 after the last block, 1 in the last block, and so on down.

    Parameters before the first block are one deeper than that block; parameters between two blocks have the depth of
    the preceding block. The output head and the modules in ``heads`` always have depth 0.
    """
    blocks, head = body_blocks(model), head_module(model)
    top = [*heads, *([head] if head is not None else [])]
    result: dict[str, int] = {}
    begun = 0
    for name, module in base_modules(model):
        inside = next((i for i, block in enumerate(blocks, 1) if is_within(name, block)), 0)
        begun = max(begun, inside)
        depth = len(blocks) + 1 - (inside or begun)
        if is_within(name, *top) or (not inside and begun == len(blocks)):
            depth = 0
        for key, parameter in module._parameters.items():
            if parameter is not None:
                result[join(name, key)] = depth
    return result


def body_blocks(model: nn.Module) -> list[str]:
    """The names of the model's blocks in the order in which they run, without the output head."""
    names, head = [name for name, _ in find_blocks(model)], _output_layer(model)
    below = [name for name in names if head is None or not is_within(head, name)]
    return [name for name in below if not is_within(name, *(other for other in below if other != name))]


def head_module(model: nn.Module) -> str | None:
    """The outermost module that contains the output head but no block; None if the head cannot be determined.

    For a head of several layers (``classifier.dense``, ``classifier.out_proj``) this is ``classifier``.
    """
    head = _output_layer(model)
    if head is None:
        return None
    blocks = body_blocks(model)
    wider = (*parents(head)[1:], head)
    return next(name for name in wider if not is_within(name, *blocks) and not any(is_within(b, name) for b in blocks))


def tail_modules(model: nn.Module) -> list[str]:
    """The names of the outermost modules with depth 0: final norm, pooler and head."""
    left_alone = in_frozen_part(model)
    found = {key: depth for key, depth in depths(model).items() if not left_alone(key)}
    top: list[str] = []
    for name, _ in base_modules(model):
        inside = [d for key, d in found.items() if is_within(key, name)]
        if name and inside and not any(inside) and not is_within(name, *top):
            top.append(name)
    return top


def _output_layer(model: nn.Module) -> str | None:
    """The output head, including a head that is the only linear layer, as in a convolutional network."""
    sites = weight_sites(model)
    left_alone = in_frozen_part(model)
    last = [name for name in sites if not left_alone(name)][-1:]
    alone = [name for name, site in sites.items() if site.linear_like and not left_alone(name)] == last
    return last[0] if alone and last and len(sites) > 1 else output_head(model, sites)


def parameters_in(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The base's parameters in the module called ``name``, by qualified name."""
    found: dict[str, nn.Parameter] = {}
    for inner, module in base_modules(model.get_submodule(name)):
        found |= {join(name, inner, n): p for n, p in module._parameters.items() if p is not None}
    return found
