"""FSDP1 (``FSDPStrategy``): shard the frozen base, and keep what trains whole on every process.

FSDP1 flattens the parameters of a unit into one. In a unit with frozen and trained parameters, the gradients would take
memory for all of them, and the state dict would gather all of them. Here FSDP1 gets the frozen parameters only
(``ignored_states`` names the others), and the gradients of the others are averaged as in DDP. Optimizers, clipping and
checkpoints then work as on one device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.names import canonical, listed
from lightning_peft.core.record import deferred_parameters
from lightning_peft.core.sharded_tensors import FlatPart, flat_part
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import is_fsdp1, local_state_dict
from lightning_peft.trainer.checkpoints.optimizer_names import optimizer_by_name
from lightning_peft.trainer.checkpoints.sharded import adapt_files, agreed_keys, load_file
from lightning_peft.trainer.checkpoints.trimming import trim_state

__all__ = ["adapt", "average_gradients", "refuse_wrapped"]

_ROOT = "_peft_fsdp1_root"


def adapt(strategy: Any) -> None:
    """Replace the functions of this ``FSDPStrategy`` that wrap the module, and that collect, save and load its state.

    Raises:
        MisconfigurationException: with ``use_orig_params=False``.
    """
    if not strategy.kwargs.get("use_orig_params", True):
        raise MisconfigurationException(
            "FSDPStrategy(use_orig_params=False) is not supported with PEFT methods, because it replaces the module's "
            "parameters by flat ones without names. Remove the argument: Lightning's default is True"
        )
    wrap, folder = strategy._setup_model, strategy._state_dict_type == "sharded"

    def lightning_module_state_dict() -> dict[str, Any]:
        module = strategy.lightning_module
        state = trim_state(module, local_state_dict(module, keep_vars=True), agreed_keys(module))
        if parts := [key for key, value in state.items() if flat_part(value) is not None]:
            raise StateError(
                f"{listed(parts)} changed without gradients, and FSDP1 has split these parameters, so they cannot be "
                "saved. Name them in trainable, or use FSDP2 (ModelParallelStrategy)"
            )
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}

    def optimizer_state(optimizer: Any) -> Any:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        return optimizer_by_name(optimizer, strategy.lightning_module) if folder else optimizer.state_dict()

    strategy._setup_model = lambda model: _wrapped(strategy, wrap, model)
    strategy.lightning_module_state_dict = lightning_module_state_dict
    strategy.optimizer_state = optimizer_state
    adapt_files(strategy, folder, load_file)
    _adapt_precision(strategy)


def _adapt_precision(strategy: Any) -> None:
    precision = strategy.precision_plugin
    after = precision.post_backward

    def post_backward(tensor: Tensor, module: Any) -> Tensor:
        average_gradients(p for p in module.parameters() if p.requires_grad)
        return after(tensor, module)

    def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
        # Lightning refuses this, because with FSDP1 each process usually has only a part of the gradients.
        nn.utils.clip_grad_norm_(precision.main_params(optimizer), clip_val)

    precision.post_backward, precision.clip_grad_by_norm = post_backward, clip_grad_by_norm
    strategy.precision_plugin = precision  # without one, the property returns a new object each time


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their averages over all processes; a collective.

    A parameter without a gradient counts as zero, unless no process has one. Repeating it changes nothing, so it may
    run in every backward pass of an accumulation.
    """
    every = list(parameters)
    if not every:
        return
    used = torch.tensor([p.grad is not None for p in every], dtype=torch.int32, device=every[0].device)
    torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX)
    every = [p for p, anywhere in zip(every, used.tolist()) if anywhere]
    for dtype in dict.fromkeys(p.dtype for p in every):
        some = [p for p in every if p.dtype is dtype]
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in some])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for parameter, mean in zip(some, flat.split([p.numel() for p in some])):
            parameter.grad = mean.view_as(parameter).clone()


def _wrapped(strategy: Any, wrap: Callable[[Any], Any], model: Any) -> Any:
    """Return ``wrap(model)`` without the trained parameters, or the wrapper from an earlier run of this module."""
    if (before := vars(model).get(_ROOT)) is not None:
        return before[0]
    inside = {id(m) for stack in stacks(model).values() for m in stack.modules()}
    whole = _whole_parameters(model, inside)
    for parameter in whole:  # FSDP1 does not move ignored parameters
        parameter.data = parameter.data.to(strategy.root_device)
    kwargs = dict(strategy.kwargs)
    more: dict[str, Any] = {"ignored_states": [*whole, *_ignored_by_user(kwargs)]}
    if (policy := kwargs.get("auto_wrap_policy")) is not None:
        more["auto_wrap_policy"] = _outside(policy, inside)
    strategy.kwargs = {k: v for k, v in kwargs.items() if k != "ignored_modules"} | more
    try:
        root = wrap(model)
    finally:
        strategy.kwargs = kwargs
    _describe_parts(root)
    _keep_dtype(root, inside)
    vars(model)[_ROOT] = (root,)  # in a tuple: torch would register a module as a child
    return root


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model if the user's code has already wrapped parts of it.

    Raises:
        MisconfigurationException: if there are such parts; the message names them.
    """
    wrapped = [canonical(name) for name, module in model.named_modules() if is_fsdp1(module)]
    if wrapped and _ROOT not in vars(model):
        raise MisconfigurationException(
            f"{listed(wrapped)} was wrapped in FullyShardedDataParallel by your code, which flattens adapters and "
            "frozen weights into one parameter. Remove wrap() and pass auto_wrap_policy to FSDPStrategy"
        )


def _whole_parameters(model: nn.Module, adapters: set[int]) -> list[nn.Parameter]:
    """The parameters that stay whole: trained ones, adapters', and those of another dtype than most of the base.

    FSDP1 cannot flatten several dtypes into one parameter.
    """
    trains = {id(p) for p in (*deferred_parameters(model), *(p for p in model.parameters() if p.requires_grad))}
    trains |= {id(p) for m in model.modules() if id(m) in adapters for p in m.parameters(recurse=False)}
    whole = [p for p in model.parameters() if id(p) in trains]
    frozen = [p for p in model.parameters() if id(p) not in trains]
    sizes: Counter[torch.dtype] = Counter()
    for parameter in frozen:
        sizes[parameter.dtype] += parameter.numel()
    usual = max(sizes, key=sizes.__getitem__, default=None)
    others = [p for p in frozen if p.dtype is not usual]
    if others:
        rank_zero_info(
            f"FSDP1 shards the parameters of {usual}; {len(others)} frozen parameters of other dtypes "
            f"({sum(p.numel() for p in others):,} values) stay whole on every process"
        )
    own = sum(p.numel() for p in whole)
    if own > sum(sizes.values()):
        rank_zero_warn(
            f"FSDP1 shards frozen parameters only, and {own:,} of {own + sum(sizes.values()):,} train: each process "
            "holds these, their gradients and their optimizer state whole. FSDP2 (ModelParallelStrategy) shards them"
        )
    return [*whole, *others]


def _ignored_by_user(kwargs: dict[str, Any]) -> list[nn.Parameter]:
    given = [*(kwargs.get("ignored_modules") or ()), *(kwargs.get("ignored_states") or ())]
    return [p for each in given for p in (each.parameters() if isinstance(each, nn.Module) else [each])]


def _outside(policy: Any, adapters: set[int]) -> Any:
    """``policy``, which never wraps an adapter or a part of one."""
    from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

    if isinstance(policy, CustomPolicy):
        return CustomPolicy(lambda module: id(module) not in adapters and policy._lambda_fn(module))
    if isinstance(policy, ModuleWrapPolicy):
        return CustomPolicy(lambda module: id(module) not in adapters and policy(module, False, nonwrapped_numel=0))

    def wraps(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        inside = id(module) in adapters
        return not inside and policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)

    return wraps


def _describe_parts(root: nn.Module) -> None:
    """Set the attribute of each parameter that :func:`flat_part` reads."""
    for unit in filter(is_fsdp1, root.modules()):
        handle = getattr(unit, "_handle", None)
        if handle is None:
            continue
        # FSDP1 would store weights as plain attributes during a forward pass. Python finds these before it calls
        # __getattr__, so reading a weight would bypass its adapters.
        handle._setattr_tensor = handle._setattr_param = _put
        if not handle.uses_sharded_strategy:
            continue
        flat, found = handle.flat_param, {}
        for parameter, info, shape, name in zip(flat._params, flat._shard_param_infos, flat._shapes, flat._param_infos):
            part = FlatPart(torch.Size(shape), info.intra_param_start_idx or 0, handle.process_group)
            found[name.module, name.param_name] = parameter._peft_flat_part = part
        for parameter, shared in zip(flat._shared_params, flat._shared_param_infos):
            parameter._peft_flat_part = found[shared.prim_module, shared.prim_param_name]


def _put(module: nn.Module, name: str, value: Any) -> None:
    module._parameters[name] = value


def _keep_dtype(root: Any, adapters: set[int]) -> None:
    """Keep the dtype of adapters' buffers, which FSDP1 would cast like those of the base."""
    names = {
        canonical(f"{prefix}.{name}")
        for prefix, module in root.module.named_modules()
        if id(module) in adapters
        for name, _ in module.named_buffers(recurse=False)
    }
    for unit in filter(is_fsdp1, root.modules()):
        unit._ignored_buffer_names |= names
