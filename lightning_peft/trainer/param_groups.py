"""Split an optimizer's parameter groups, and update its learning-rate schedulers to match.

A method that trains some parameters at another rate (LoRA+, discriminative learning rates by depth) splits the user's
groups; each part keeps all options of its group. A scheduler that was built before the split holds one value per group
(``base_lrs``, ``lr_lambdas``, ``min_lrs``, ...), so its lists are split in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "drop_empty_groups",
    "optimizers_in",
    "remember_schedulers",
    "schedulers_in",
    "schedulers_of",
    "split_groups",
]

#: keys of a parameter group in which schedulers store learning rates (OneCycleLR uses all of them)
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def split_groups(
    optimizer: Optimizer,
    assign: Callable[[nn.Parameter], Mapping[str, Any]],
    schedulers: Iterable[Any] | None = None,
) -> None:
    """Split the groups of ``optimizer`` by the options that ``assign`` returns for each parameter.

    Parameters of one group with equal options stay together and in order, and the parts of a group take its place in
    the list. Two splits compose: the scales multiply.

    Args:
        optimizer: The optimizer; changed in place, its state is kept.
        assign: Returns the options to change for one parameter. ``lr_scale`` multiplies every learning rate of the
            group and of its schedulers; any other option (``weight_decay``, ``betas``) replaces that of the group. An
            empty mapping changes nothing.
        schedulers: The learning-rate schedulers of this optimizer; by default those that :func:`remember_schedulers`
            recorded, which inside a Trainer are all that ``configure_optimizers`` returned.

    Raises:
        ValueError: if ``assign`` returns an option that the optimizer does not have, or a scale that is not positive.

    Example::

        split_groups(optimizer, lambda p: {"lr_scale": 16.0} if id(p) in of_b else {})
    """
    groups: list[dict[str, Any]] = []
    origin: list[tuple[int, float]] = []  # for each new group: the index of the old one, and the scale
    before = len(optimizer.param_groups)
    for index, group in enumerate(optimizer.param_groups):
        parts: dict[tuple[Any, ...], tuple[dict[str, Any], list[int]]] = {}
        for position, parameter in enumerate(group["params"]):
            options = dict(assign(parameter))
            _check(options, group, optimizer)
            # By repr, because values such as lists and tensors cannot be compared as keys.
            key = tuple(sorted((name, repr(value)) for name, value in options.items()))
            parts.setdefault(key, (options, []))[1].append(position)
        for options, positions in parts.values() or [({}, [])]:
            scale = float(options.pop("lr_scale", 1.0))
            groups.append(_part(group, options, scale, positions))
            origin.append((index, scale))
    _make_names_unique(groups)
    optimizer.param_groups[:] = groups  # in place, because wrapping optimizers and some schedulers share this list
    for scheduler in schedulers_of(optimizer) if schedulers is None else schedulers:
        for one in _nested(scheduler):
            _split_lists(one, before, origin)


def _check(options: Mapping[str, Any], group: Mapping[str, Any], optimizer: Optimizer) -> None:
    unknown = sorted(options.keys() - group.keys() - {"lr_scale"})
    if unknown or "params" in options or "lr" in options:
        known = sorted(group.keys() - {"params", "param_names", "lr"})
        raise ValueError(
            f"{(unknown or ['params or lr'])[0]!r} cannot be set for a part of a group of {type(optimizer).__name__}: "
            f"use one of {['lr_scale', *known]}"
        )
    if not options.get("lr_scale", 1.0) > 0:
        raise ValueError(f"lr_scale must be above 0, got {options['lr_scale']!r}")


def _part(group: Mapping[str, Any], options: Mapping[str, Any], scale: float, positions: list[int]) -> dict[str, Any]:
    part = {**group, **options, "params": [group["params"][i] for i in positions]}
    if "param_names" in group:
        part["param_names"] = [group["param_names"][i] for i in positions]
    for rate in _RATES:
        if part.get(rate) is not None:
            part[rate] = _scaled(part[rate], scale)
    return part


def _make_names_unique(groups: Iterable[dict[str, Any]]) -> None:
    """Make the names of the groups unique, as LearningRateMonitor requires."""
    taken: set[str] = set()
    for group in groups:
        if "name" in group:
            plain, number = group["name"], 1
            while group["name"] in taken:
                group["name"], number = f"{plain}/{number}", number + 1
            taken.add(group["name"])


def _scaled(value: Any, scale: float) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if scale == 1 else value * scale  # changed in place by schedulers: never share it
    return value if scale == 1 else value * scale


def _split_lists(scheduler: Any, before: int, origin: list[tuple[int, float]]) -> None:
    for name, values in list(vars(scheduler).items()):
        rates = name.endswith("lrs") or name == "_last_lr"
        if not (rates or name.endswith(("lr_lambdas", "momentums"))):
            continue
        if isinstance(values, list | tuple) and len(values) == before:
            setattr(scheduler, name, [_scaled(values[i], scale) if rates else values[i] for i, scale in origin])


def drop_empty_groups(optimizer: Optimizer) -> None:
    """Remove groups without parameters from ``optimizer``, and their values from its schedulers.

    DeepSpeed itself removes such groups from the optimizer only, so the first step of a scheduler would fail.
    """
    groups = optimizer.param_groups
    kept = [(i, 1.0) for i, group in enumerate(groups) if group["params"]]
    before, groups[:] = len(groups), [groups[i] for i, _ in kept]
    for scheduler in schedulers_of(optimizer):
        for one in _nested(scheduler):
            _split_lists(one, before, kept)


def remember_schedulers(configured: Any) -> None:
    """Record on each optimizer the schedulers that ``configure_optimizers`` returned with it."""
    for scheduler in schedulers_in(configured):
        optimizer = scheduler.optimizer
        known = optimizer.__dict__.setdefault("_peft_schedulers", [])
        if not any(scheduler is other for other in known):
            known.append(scheduler)


def schedulers_of(optimizer: Optimizer) -> list[Any]:
    """The schedulers of ``optimizer`` that :func:`remember_schedulers` recorded."""
    return list(optimizer.__dict__.get("_peft_schedulers", ()))


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in any value that ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, Iterable):
        for part in configured:
            yield from optimizers_in(part)


def schedulers_in(configured: Any) -> Iterator[Any]:
    """The learning-rate schedulers in any value that ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer | str):
        return
    if isinstance(configured, Mapping):
        for value in configured.values():
            yield from schedulers_in(value)
    elif _is_scheduler(configured):
        yield configured
    elif isinstance(configured, Iterable):
        for part in configured:
            yield from schedulers_in(part)


def _is_scheduler(value: Any) -> bool:
    return isinstance(getattr(value, "optimizer", None), Optimizer) and hasattr(value, "step")


def _nested(scheduler: Any) -> Iterator[Any]:
    """``scheduler`` and all schedulers inside it (SequentialLR, ChainedScheduler, warm-up wrappers), each once."""
    todo, seen = [scheduler], set()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        for value in vars(one).values():
            inner = value if isinstance(value, list | tuple) else [value]
            todo += [s for s in inner if _is_scheduler(s) and not isinstance(s, Optimizer)]
