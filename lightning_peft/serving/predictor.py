"""Answer inputs with a module's ``predict_step``, in batches whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.serving.errors import RequestError
from lightning_peft.serving.rows_context import RowsContext

__all__ = ["DataInputs", "Inputs", "Predictor", "TensorInputs"]


class Inputs(Protocol):
    """Converts the clients' inputs to batches, and outputs of ``predict_step`` to JSON values."""

    def batch(self, inputs: Sequence[Any]) -> Any:
        """Return the batch for ``predict_step``, one row for each input.

        Raises:
            RequestError: if an input is not usable.
        """

    def answers(self, output: Any, batch: Any, count: int) -> list[Any]:
        """Return the JSON value for each of ``count`` rows of a batch."""


class DataInputs:
    """For a module whose DataModule prepares its rows: an input is a row, given as an object with the columns' values.

    If the data needs only one column, an input may be its value alone. An answer has the columns that ``lightning-peft
    predict`` writes.

    Args:
        module: the served module.
        data: one of ``lightning_peft.data``, or one with the same ``examples`` and ``collate``.
    """

    def __init__(self, module: L.LightningModule, data: Any) -> None:
        self._module, self._data = module, data
        self._columns = [name for name in data.columns if name not in data.targets]

    def batch(self, inputs: Sequence[Any]) -> Any:
        rows = [self._row(value) for value in inputs]
        try:
            return self._data.collate([dict(e) for e in self._data.examples(rows, "predict")], "predict")
        except ValueError as error:  # it names the row
            raise RequestError(422, f"inputs: {error}") from error

    def answers(self, output: Any, batch: Any, count: int) -> list[Any]:
        name_columns: Any = getattr(self._module, "prediction_columns", None)
        columns = output if name_columns is None else name_columns(output, batch)
        return _by_row(columns, count)

    def _row(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) and len(self._columns) == 1:
            value = {self._columns[0]: value}
        if not isinstance(value, Mapping) or value.keys() != set(self._columns):
            raise RequestError(422, f"inputs: each must be an object with {', '.join(self._columns)}")
        return dict(value)


class TensorInputs:
    """For any module: an input is a number, a list (of lists) of numbers, or an object of these by name.

    Whole numbers become int64, others the module's dtype. The batch is a tensor, or a dictionary of tensors by name.
    An output may be a tensor, or a dictionary, list or tuple of tensors, each with one entry for each row. A number
    that an ``nn.Embedding`` has no row for is refused.

    Args:
        module: the served module.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.register_forward_pre_hook(_check_indices)

    def batch(self, inputs: Sequence[Any]) -> Any:
        if all(isinstance(value, Mapping) for value in inputs):
            names = inputs[0].keys()
            if any(value.keys() != names for value in inputs):
                raise RequestError(422, "inputs: all objects must have the same names")
            return {name: self._tensor([value[name] for value in inputs]) for name in names}
        return self._tensor(inputs)

    def answers(self, output: Any, batch: Any, count: int) -> list[Any]:
        return _by_row(output, count)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        try:
            tensor = torch.tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError(
                422,
                "inputs: expected numbers, lists of numbers of one shape, or objects of these by name (the server "
                "takes texts and other rows if it is started with --data)",
            ) from error
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


class Predictor:
    """Runs ``predict_step`` of a module.

    Args:
        module: the module, with its adapters.
        context: the :class:`RowsContext` of the module.
        inputs: converts inputs to batches; by default :class:`TensorInputs`.
    """

    def __init__(self, module: L.LightningModule, context: RowsContext, inputs: Inputs | None = None) -> None:
        self.module, self._context, self.inputs = module, context, inputs or TensorInputs(module)

    @torch.inference_mode()
    def run(self, inputs: Sequence[Any], adapters: Sequence[str | None]) -> list[Any]:
        """Answer inputs, each with its adapter (an internal name, or None for the base)."""
        batch = self.module.transfer_batch_to_device(self.inputs.batch(inputs), self.module.device, 0)
        self._context.enter(adapters)
        return self.inputs.answers(self.module.predict_step(batch, 0), batch, len(inputs))


def _check_indices(embedding: nn.Embedding, args: tuple[Any, ...]) -> None:
    # On a GPU, one number out of range would stop the process and all its requests: CUDA cannot continue after such an
    # error.
    if args and isinstance(args[0], Tensor) and args[0].numel():
        low, high = (int(end) for end in args[0].aminmax())
        if low < 0 or high >= embedding.num_embeddings:
            wrong = low if low < 0 else high
            raise RequestError(422, f"inputs: {wrong} is out of range: expected 0 to {embedding.num_embeddings - 1}")


def _by_row(output: Any, count: int) -> list[Any]:
    """Return the entry of each row as JSON values."""
    if isinstance(output, Tensor):
        if output.ndim == 0 or len(output) != count:
            raise RequestError(
                500,
                f"predict_step returned {tuple(output.shape)} for {count} inputs: its first dimension must have one "
                "entry for each",
            )
        return output.tolist()
    if isinstance(output, Mapping):
        columns = {name: _by_row(value, count) for name, value in output.items()}
        return [{name: values[i] for name, values in columns.items()} for i in range(count)]
    if isinstance(output, tuple) or (isinstance(output, list) and output and isinstance(output[0], Tensor)):
        return [list(row) for row in zip(*(_by_row(value, count) for value in output))]
    if isinstance(output, list) and len(output) == count:
        return output
    raise RequestError(500, f"predict_step returned {type(output).__name__}, which has no entry for each input")
