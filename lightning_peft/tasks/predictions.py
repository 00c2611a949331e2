"""Write what ``predict`` returns to a file: one line per row, after the columns of the input."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.pretrained import InputError

_SUFFIXES = (".csv", ".jsonl", ".safetensors")


class PredictionWriter(BasePredictionWriter):
    """Writes predictions to a file at the end of ``predict``, in the order of the rows.

    A task names its columns with ``prediction_columns(output, batch)`` (``label`` and ``probability`` of a classifier,
    ``prediction`` of the others). For any other module, a tensor or list with one entry per row becomes the column
    ``prediction``, and a dictionary of them becomes one column per key. Before them come the input's columns, if the
    DataModule has ``prediction_inputs()``. A predicted column of the same name is then written as ``predicted_<name>``.

    Args:
        output: A path that ends in ``.csv``, ``.jsonl``, or ``.safetensors`` for tensors alone; ``None`` for
            ``predictions.csv``, or ``predictions.safetensors`` if the task predicts embeddings.

    Raises:
        InputError: if the path has a different ending.

    Example::

        trainer = L.Trainer(callbacks=[lp.LoRA(r=8), PredictionWriter("answers.jsonl")])
        trainer.predict(module, data, ckpt_path="best.ckpt", return_predictions=False)
    """

    def __init__(self, output: str | Path | None = None) -> None:
        super().__init__("batch")
        if output is not None and Path(output).suffix not in _SUFFIXES:
            raise InputError(f"output={str(output)!r}: the file's name must end in one of {', '.join(_SUFFIXES)}.")
        self.output = None if output is None else Path(output)
        self._parts: list[tuple[list[int], dict[str, Any]]] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts = []

    def write_on_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        *_: Any,
    ) -> None:
        columns = _columns(pl_module, prediction, batch)
        count = len(next(iter(columns.values()), ()))
        done = sum(len(indices) for indices, _ in self._parts)
        self._parts.append((list(batch_indices or range(done, done + count)), columns))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = self._parts
        if trainer.world_size > 1:
            every: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(every, parts)
            parts = [part for rank in every for part in rank]
        if trainer.is_global_zero:
            self._write(parts, trainer, pl_module)

    def _write(self, parts: list[Any], trainer: L.Trainer, module: L.LightningModule) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for indices, columns in parts:
            for row, index in enumerate(indices):
                rows[index] = {name: values[row] for name, values in columns.items()}
        if not rows or not any(rows.values()):
            print(
                f"{type(module).__name__}.predict_step returned nothing that has an entry per row: no file was written"
            )
            return
        path = self.output or Path("predictions").with_suffix(getattr(module, "prediction_suffix", ".csv"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _save_tensors(rows, path)
        else:
            _save_table(_with_inputs(rows, getattr(trainer, "datamodule", None)), path)
        print(f"{len(rows):,} predictions: {path}")


def _columns(module: L.LightningModule, prediction: Any, batch: Any) -> dict[str, Any]:
    name_columns = getattr(module, "prediction_columns", None)
    if name_columns is not None:
        found = name_columns(prediction, batch)
    elif isinstance(prediction, Mapping):
        found = dict(prediction)
    else:
        found = {"prediction": prediction}
    kept = {name: value for name, value in found.items() if _per_row(value)}
    return {name: value.detach().cpu() if isinstance(value, Tensor) else list(value) for name, value in kept.items()}


def _per_row(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list | tuple)


def _with_inputs(rows: dict[int, dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    """The predicted columns after those of the input, in the order of the input."""
    inputs = getattr(data, "prediction_inputs", None)
    if inputs is None:
        return [rows[index] for index in sorted(rows)]
    table = []
    for index, given in enumerate(inputs()):
        if index in rows:
            named = {f"predicted_{name}" if name in given else name: value for name, value in rows[index].items()}
            table.append({**given, **named})
    return table


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _save_table(table: list[dict[str, Any]], path: Path) -> None:
    plain = [{name: _plain(value) for name, value in row.items()} for row in table]
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in plain)
            return
        writer = csv.DictWriter(file, list(plain[0]))
        writer.writeheader()
        for row in plain:
            writer.writerow(
                {n: json.dumps(v, default=str) if isinstance(v, list | dict) else v for n, v in row.items()}
            )


def _save_tensors(rows: dict[int, dict[str, Any]], path: Path) -> None:
    first = next(iter(rows.values()))
    names = [name for name, value in first.items() if isinstance(value, Tensor | float | int)]
    if not names:
        raise InputError(
            f"{path}: the predictions {', '.join(first)} are texts, which a .safetensors file cannot hold: pass an "
            "--output that ends in .csv or .jsonl."
        )
    save_file({name: torch.stack([torch.as_tensor(rows[i][name]) for i in sorted(rows)]) for name in names}, path)
