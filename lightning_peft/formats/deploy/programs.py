"""Write a plain model as a program without its Python code: an ONNX file, or a file of ``torch.export``.

Each file is loaded again by its own software and compared with the model before it is kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.optional import config_value
from lightning_peft.core.state.atomic_file import writing
from lightning_peft.core.targeting.trial_forward import tensors_in
from lightning_peft.formats.deploy.plain_lora import DeployError

__all__ = ["Program", "program_of", "write_onnx", "write_torch_export"]

#: the tolerance: the largest difference of an output, relative to the largest output
TOLERANCE = 1e-4
_LENGTH = 8


class Program(nn.Module):
    """A model as a function of tensors: positional inputs, and the model's main output.

    Attributes:
        names: the names of the inputs.
        inputs: example inputs, in this order.
        dynamic: for each input, the dimensions that may have another size.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], keywords: bool) -> None:
        super().__init__()
        self.model, self.keywords = model, keywords
        self.names, self.inputs = list(inputs), tuple(inputs.values())
        self.dynamic = [[0, 1] if not t.is_floating_point() and t.ndim == 2 else [0] for t in self.inputs]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits, or the first tensor of the output if it has none."""
        output = self.model(**dict(zip(self.names, inputs))) if self.keywords else self.model(*inputs)
        logits = output.get("logits") if isinstance(output, Mapping) else None
        return logits if isinstance(logits, Tensor) else next(iter(tensors_in(output)))


def program_of(model: nn.Module, network: nn.Module | None) -> Program:
    """Return a model as a function of tensors, with example inputs.

    Args:
        model: a plain model, such as a LightningModule with ``example_input_array``.
        network: the Hugging Face model inside it, if it has one.

    Raises:
        DeployError: if no example input is known.
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        if isinstance(example, Mapping):
            return Program(model, example, keywords=True).eval()
        args = example if isinstance(example, tuple | list) else (example,)
        return Program(model, {f"input_{i}": arg for i, arg in enumerate(args)}, keywords=False).eval()
    inputs = _inputs(network) if network is not None else None
    if network is None or inputs is None:
        raise DeployError(
            f"{type(model).__name__} has no example input, which is needed to record its program: set "
            "self.example_input_array to a tensor or a tuple of tensors"
        )
    config: Any = network.config
    if config_value(config, "use_cache") is not None:
        config.use_cache = False  # a cache is an output too, and starts empty in each call
    return Program(network, inputs, keywords=True).eval()


def write_torch_export(program: Program, path: Path) -> str:
    """Write a ``.pt2`` file with ``torch.export.save``; return a sentence about the sizes of its inputs.

    Raises:
        DeployError: if the model cannot be exported, or the exported one computes different outputs.
    """
    exported, sizes = _exported(program)
    with _written(path) as file:
        torch.export.save(exported, file)
        loaded = torch.export.load(file).module()
        _compare(program, lambda inputs: loaded(*inputs), "torch.export.load")
    return sizes


def write_onnx(program: Program, path: Path) -> str:
    """Write an ``.onnx`` file with ``torch.onnx.export``; return a sentence about the sizes of its inputs.

    Raises:
        DeployError: if the model cannot be exported, or onnxruntime computes different outputs.
    """
    import onnxruntime

    exported, sizes = _exported(program)
    try:
        made = torch.onnx.export(
            exported, dynamo=True, input_names=program.names, output_names=["output"], verbose=False
        )
    except Exception as error:  # the exporter raises many types, for any operation that ONNX lacks
        raise DeployError(
            f"torch.onnx cannot export this model: {_first_line(error)}. Use --for torch-export"
        ) from error
    assert made is not None
    with _written(path) as file:
        made.save(str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        if names != program.names:
            lost = sorted(set(program.names) - set(names))
            raise DeployError(f"the exported model does not use its inputs {lost}: remove them from the example input")
        _compare(
            program,
            lambda inputs: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, inputs)})[0]),
            "onnxruntime",
        )
    return sizes


def _inputs(network: nn.Module) -> dict[str, Tensor] | None:
    """Example inputs of a Hugging Face model: texts of 8 tokens, or images of the configured size."""
    config, name = network.config, getattr(network, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        ids = torch.randint(1, config_value(config, "vocab_size", 2), (2, _LENGTH), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**found, "decoder_input_ids": ids} if config_value(config, "is_encoder_decoder") else found
    size = config_value(config, "image_size")
    if name == "pixel_values" and size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {name: torch.randn(2, config_value(config, "num_channels", 3), *sides, generator=generator)}
    return None


def _exported(program: Program) -> tuple[Any, str]:
    """Record the program with as many variable sizes as it allows."""
    dynamic = torch.export.Dim.DYNAMIC
    every = tuple(dict.fromkeys(dims, dynamic) for dims in program.dynamic)
    batch = tuple({0: dynamic} for _ in program.inputs)
    choices = ((every, "any batch size and length"), (batch, "any batch size"))
    for shapes, sizes in choices if every != batch else choices[1:]:
        try:
            return torch.export.export(program, program.inputs, dynamic_shapes=(shapes,)), sizes
        except Exception:  # the user's forward may fix a size in many ways; the next choice varies fewer
            continue
    try:
        exported = torch.export.export(program, program.inputs)
    except Exception as error:
        raise DeployError(f"torch.export cannot record this model: {_first_line(error)}") from error
    return exported, f"only inputs of the sizes {[tuple(t.shape) for t in program.inputs]}"


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Give a path in a temporary folder, whose files are moved beside ``path`` if there is no error."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            yield Path(folder) / path.name
            for file in Path(folder).iterdir():  # ONNX stores large weights in a second file
                shutil.move(file, path.parent / file.name)


@torch.no_grad()
def _compare(program: Program, run: Callable[[tuple[Tensor, ...]], Tensor], software: str) -> None:
    expected, found = program(*program.inputs), run(program.inputs)
    difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
    if not difference <= TOLERANCE:
        raise DeployError(
            f"{software} does not compute the same as the model: the outputs differ by {difference:.3g} of the largest "
            f"output, more than {TOLERANCE:g}. Nothing was written"
        )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
