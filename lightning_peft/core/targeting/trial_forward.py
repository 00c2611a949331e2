"""Run a model on the meta device, to find out which layers its output comes from.

Names do not show how a forward uses its layers, so this module runs the forward and follows the autograd graph back
from the output. It runs a copy with all parameters and buffers on the meta device: a trial needs no memory and little
time, and leaves the model, its buffers and the random number generators unchanged.

A trial is possible if an input is known (``example_input_array``, a Hugging Face config, or a shape that the first
layers accept) and the forward does not depend on values. Otherwise callers fall back on names and order.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_peft.core.module_io import parameters_of, tensors_in
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = ["TRIAL_LENGTH", "embeddings_problem", "failure", "last_layers", "sources", "try_forward"]

#: sequence length of a trial input; an unlikely number of classes, so that sequence and class outputs differ in shape
TRIAL_LENGTH = 11

#: cached result per model, with the ids of the modules that were tried: a replaced module invalidates the entry
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[frozenset[int], list[str] | None]] = weakref.WeakKeyDictionary()


def last_layers(model: nn.Module, names: Iterable[str]) -> list[str] | None:
    """Return those of the modules ``names`` that the output comes from without another of them in between.

    The list has several entries for a model with several heads. It is empty if earlier layers also reach the output
    around the last ones, as in a residual stream. None if no trial is possible.
    """
    wanted = list(names)
    parts = frozenset(id(model.get_submodule(name)) for name in wanted)
    known = _KNOWN.get(model)
    if known is None or known[0] != parts:
        known = _KNOWN[model] = parts, _by_trial(model, wanted)
    return known[1]


def _by_trial(model: nn.Module, names: list[str]) -> list[str] | None:
    made: dict[Node, str] = {}

    def watch(twin: nn.Module) -> None:
        for name in names:
            twin.get_submodule(name).register_forward_hook(_remember(name, made))

    output = try_forward(model, watch)
    return None if output is None else sources(output, made)


def _remember(name: str, made: dict[Node, str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                made[tensor.grad_fn] = name

    return hook


def sources(outputs: Iterable[Tensor], made: Mapping[Node, str]) -> list[str]:
    """Return the names first reached when following the autograd graph back from ``outputs``.

    The list is empty if one of these modules also feeds another: then there is no single last layer.

    Args:
        outputs: tensors with an autograd graph.
        made: maps graph nodes to the name of the module that created them.
    """
    nodes = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    first = _upstream(nodes, made)
    found = {made[node] for node in first}
    below = {made[node] for node in _upstream([n for node in first for n, _ in node.next_functions if n], made, True)}
    order = list(dict.fromkeys(made.values()))  # the order in which the modules ran
    return [] if found & below else sorted(found, key=order.index)


def _upstream(nodes: Iterable[Node], marked: Mapping[Node, str], past: bool = False) -> list[Node]:
    """Return the marked nodes upstream of ``nodes``: only the nearest ones, or all of them if ``past``."""
    waiting, seen, found = list(nodes), set(), []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in marked:
            found.append(node)
            if not past:
                continue
        waiting += [n for n, _ in node.next_functions if n is not None]
    return found


def try_forward(model: nn.Module, prepare: Callable[[nn.Module], None] | None = None) -> list[Tensor] | None:
    """Return the output tensors of ``model`` on a meta input; None if it accepts none of the inputs that can be
    guessed.

    Args:
        model: any module; it is not changed.
        prepare: called with each copy before it runs, to register hooks on it.
    """
    for args, kwargs in _inputs(model):
        try:
            found = _run(model, args, kwargs, prepare)
        except Exception:  # a user's forward may raise anything if the input does not fit or it needs values
            continue
        if found:
            return found
    return None


def failure(model: nn.Module, prepare: Callable[[nn.Module], None]) -> tuple[bool, Exception | None]:
    """Return whether a trial is possible, and the exception that the copy raises after ``prepare`` changed it.

    The exception is None if any input works with the changed copy: the other guesses may not be inputs that the model
    was written for.
    """
    error: Exception | None = None
    for args, kwargs in _inputs(model):
        try:
            if not _run(model, args, kwargs):
                continue
        except Exception:  # as in try_forward
            continue
        try:
            _run(model, args, kwargs, prepare)
        except Exception as raised:
            error = raised
        else:
            return True, None
    return error is not None, error


def embeddings_problem(model: nn.Module) -> Exception | None:
    """Return the error of a trial with ``inputs_embeds`` in place of ``input_ids``; None if it works or is impossible.

    Args:
        model: a module whose forward takes both; it is not changed.
    """

    def embed_first(twin: Any) -> None:
        forward = twin.forward

        def embedded(**kwargs: Any) -> Any:
            if (ids := kwargs.pop("input_ids", None)) is not None:
                kwargs["inputs_embeds"] = twin.get_input_embeddings()(ids)
            return forward(**kwargs)

        twin.forward = embedded

    return failure(model, embed_first)[1]


def _run(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], prepare: Callable[[nn.Module], None] | None = None
) -> list[Tensor]:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        twin = _without_values(model, {}).eval()
        if prepare is not None:
            prepare(twin)
        return list(tensors_in(twin(*args, **kwargs)))


def _inputs(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield inputs that ``model`` may accept, the most certain first."""
    if getattr(model, "example_input_array", None) is not None:
        given = _to_meta(model.example_input_array)
        yield ((), given) if isinstance(given, dict) else (given if isinstance(given, tuple) else (given,), {})
        return
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", "")
    if config is not None and isinstance(name, str):  # a Hugging Face model
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if name == "pixel_values" and size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            yield (), {name: torch.zeros(1, channels, height, width, device="meta")}
        elif name == "input_ids":
            ids = torch.ones(2, TRIAL_LENGTH, dtype=torch.long, device="meta")
            if "attention_mask" in parameters_of(model):  # without a mask, models look for padding ids in the values
                yield (), {name: ids, "attention_mask": ids}
            yield (), {name: ids}
        return
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if sum(p.default is p.empty and p.kind not in kinds for p in parameters) == 1:
        for value in _fitting(model):
            yield (value,), {}


def _fitting(model: nn.Module) -> Iterator[Tensor]:
    """Yield inputs that the first defined layers accept."""
    layers = (m for _, m in base_modules(model) if not any(True for _ in m.children()))
    for layer, _ in zip((m for m in layers if any(True for _ in m.parameters())), range(3)):
        if isinstance(layer, nn.Embedding):
            yield torch.ones(2, 4, dtype=torch.long, device="meta")
        elif isinstance(layer, nn.modules.conv._ConvNd):
            for size in (*_sizes_of_positions(model, layer), 32, 224):
                yield torch.zeros(2, layer.in_channels, *[size] * len(layer.kernel_size), device="meta")
        elif isinstance(width := getattr(layer, "in_features", None), int):
            yield torch.zeros(2, width, device="meta")
            yield torch.zeros(2, 4, width, device="meta")


def _sizes_of_positions(model: nn.Module, patches: nn.modules.conv._ConvNd) -> Iterator[int]:
    """Yield image sizes whose patch count matches a learned position embedding, minus up to two special tokens."""
    dimensions, stride = len(patches.kernel_size), patches.stride[0]
    for shape in dict.fromkeys(parameter.shape for parameter in model.parameters()):
        if len(shape) == 3 and shape[0] == 1 and shape[2] == patches.out_channels:
            sides = ((count, round(count ** (1 / dimensions))) for count in range(max(1, shape[1] - 2), shape[1] + 1))
            yield from (side * stride for count, side in sides if side**dimensions == count)


def _without_values(module: nn.Module, done: dict[int, Any]) -> Any:
    """Copy ``module`` with its tensors on the meta device and without hooks; shared tensors stay shared.

    ``copy.deepcopy`` would copy the values as well, and everything else that a module refers to.
    """
    if id(module) in done:
        return done[id(module)]
    twin = done[id(module)] = object.__new__(type(module))
    attributes = twin.__dict__
    for key, value in module.__dict__.items():
        if "_hooks" in key and isinstance(value, dict):
            attributes[key] = OrderedDict()
        elif isinstance(value, Tensor):
            attributes[key] = value.detach().to("meta")
        else:  # a forward may write into containers, so the copy must not share them
            attributes[key] = copy.copy(value) if type(value) in (list, dict, set) else value
    attributes |= {k: None for k in ("_trainer", "_fabric", "_compiled_call_impl") if k in attributes}
    if "_device" in attributes:
        attributes["_device"] = torch.device("meta")
    for kind in ("_parameters", "_buffers"):
        attributes[kind] = {k: _shared_on_meta(t, done) for k, t in module.__dict__[kind].items()}
    attributes["_modules"] = {
        k: None if child is None else _without_values(child, done) for k, child in module.__dict__["_modules"].items()
    }
    if isinstance(module, nn.RNNBase):  # it reads them from a list
        attributes["_flat_weights"] = [attributes["_parameters"].get(name) for name in module._flat_weights_names]
    return twin


def _shared_on_meta(tensor: Tensor | None, done: dict[int, Any]) -> Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in done:
        on_meta = torch.empty_like(tensor, device="meta")
        floating = tensor.is_floating_point() and isinstance(tensor, nn.Parameter)
        done[id(tensor)] = nn.Parameter(on_meta) if floating else on_meta
    return done[id(tensor)]


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, Mapping):
        return {k: _to_meta(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_meta(v) for v in value)
    return value
