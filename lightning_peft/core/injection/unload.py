"""Give the plain model back, with or without the adapters merged into it."""

from __future__ import annotations

from torch import nn

from lightning_peft.core.adapters.lookup import hosts, stacks
from lightning_peft.core.class_swap import restore_class
from lightning_peft.core.injection.attach import check_detachable, detach
from lightning_peft.core.injection.merge import MergeError, unmerge
from lightning_peft.core.injection.merge import merge as merge_adapters
from lightning_peft.core.names import canonical
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.targeting.packed import packed_layers

__all__ = ["unload"]


def unload(model: nn.Module, merge: bool = False, dequantize: bool = False) -> nn.Module:
    """Return the plain model: original classes and keys, and the original ``requires_grad`` of every parameter.

    Args:
        model: the adapted model; changed in place and returned.
        merge: merge the active adapters into the weights first. By default, the original base weights are restored.
        dequantize: with ``merge``, replace quantised layers by plain ones; see :func:`lightning_peft.merge`.

    Raises:
        MergeError: if ``merge=True`` and an active adapter cannot be merged, or was left out of an earlier merge.
        ValueError: if a parametrization was registered on a layer after its adapters.
    """
    check_detachable(model)
    found = stacks(model).values()
    if merge and not any(stack.merged for stack in found):
        try:
            merge_adapters(model, dequantize=dequantize)
        except MergeError as error:
            raise MergeError(
                f"{error}; to unload without it, first activate the adapters to keep with lp.set_active(model, ...)"
            ) from None
    elif merge:
        beside = {n for stack in found for n, a in stack.items() if a in stack.running() and not a.is_passthrough}
        if beside:
            raise MergeError(
                f"{sorted(beside)} are active but not merged, and would be lost: call lp.unmerge(model), activate the "
                "adapters to keep with lp.set_active(model, ...), and unload again"
            )
    if not merge:
        unmerge(model)
    record, injected = injection_state(model), injected_module(model)
    for name, _ in list(hosts(model)):
        detach(model, name)
    packed = packed_layers(model)
    for module in model.modules():
        restore_class(module)
        module.__dict__.pop("_peft_injection", None)
        module.__dict__.pop("_hold_statistics", None)
        module.__dict__.pop("_peft_rows_stack", None)
        module.__dict__.pop("_peft_quantizer_marks", None)
        if not packed:
            module.__dict__.pop("_peft_prepared", None)
        if (dtype := module.__dict__.pop("_compute_dtype", None)) is not None:
            module.to(dtype)
        if (mode := module.__dict__.pop("_mode_asked", None)) is not None:
            module.train(mode)
    if record is not None:
        for name, parameter in injected.named_parameters():
            parameter.requires_grad_(canonical(name) in record.trained_before)
    return model
