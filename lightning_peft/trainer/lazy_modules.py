"""Create the parameters of lazy modules before methods are applied."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_peft.core.injection.checks import InjectionError, lazy_parameters

__all__ = ["create_lazy_parameters"]


def create_lazy_parameters(module: L.LightningModule) -> None:
    """Run ``example_input_array`` through the forward of a module with lazy modules; without both, do nothing.

    The forward runs in evaluation mode and without gradients. Buffers, modes and random numbers stay as they are.

    Raises:
        InjectionError: if the forward fails.
    """
    lazy, example = lazy_parameters(module), getattr(module, "example_input_array", None)
    if not lazy or example is None:
        return
    inputs = move_data_to_device(example, module.device)
    modes = {part: part.training for part in module.modules()}
    before = {name: buffer.clone() for name, buffer in module.named_buffers() if name not in lazy}
    try:
        for part in modes:
            part.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(inputs, Mapping):
                module(**inputs)
            else:
                module(*inputs if isinstance(inputs, tuple) else (inputs,))
    except Exception as error:  # the user's forward may raise anything
        raise InjectionError(
            f"{', '.join(lazy)} have no shape yet, and the forward with example_input_array, which would create them, "
            f"fails: {error}. Correct example_input_array, or run one batch in __init__ or configure_model"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    with torch.no_grad():
        for name, value in before.items():
            module.get_buffer(name).copy_(value)
