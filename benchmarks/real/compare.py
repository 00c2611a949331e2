"""Run ``lightning-peft compare`` on a study of this folder, with its data, model and methods.

    python -m benchmarks.real.compare e2e --data ~/data --output runs/e2e --steps 100 --trials 4 --fractions 0.1

Arguments after --data are those of compare. Learning rates start from compare's own table, not from those of the study.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor

from benchmarks.real import load, study
from benchmarks.real.study import Study, need
from lightning_peft.cli.main import main as lightning_peft

#: methods that the studies do not have
MORE = {
    "MiSS r=8": {"method": "MiSS", "r": 8},
    "LoHa r=4": {"method": "LoHa", "r": 4},
    "HiRA r=8": {"method": "HiRA", "r": 8},
    "VeRA r=64": {"method": "VeRA", "r": 64},
}


def main(arguments: list[str] | None = None) -> None:
    """Prepare the data and the configuration in the output folder, and run the command there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.compare", description=__doc__)
    parser.add_argument("study", choices=["banking77", "e2e"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options, others = parser.parse_known_args(arguments)
    study.DATA = options.data or study.DATA
    torch.set_num_threads(1)
    chosen: Any = load(options.study)
    files = options.output / "files"
    files.mkdir(parents=True, exist_ok=True)
    base = _base(chosen, files)
    (files / "base.yaml").write_text(yaml.safe_dump(base))
    (files / "methods.yaml").write_text(yaml.safe_dump(_methods(chosen), sort_keys=False))
    stories = [line for line in need("tinystories/tiny_stories.txt").read_text().splitlines() if len(line) > 60]
    (files / "stories.txt").write_text("\n".join(stories[:96]))
    metric = ["--metric=val/acc", "--search-metric=val/loss"] if options.study == "banking77" else []
    retention = [f"--retention.data={_retention(chosen, files)}", "--retention.batches=12"]
    if options.study == "banking77":
        retention += ["--retention.distance=cosine", "--retention.forward_fn=benchmarks.real.compare.features"]
    fixed = ["-c", str(files / "base.yaml"), f"--methods={files / 'methods.yaml'}", f"--output={options.output}"]
    lightning_peft(["compare", *fixed, "--test", *metric, *retention, *others])


def _base(chosen: Study, files: Path) -> dict[str, Any]:
    for tuning, folder in ((True, files / "tuning"), (False, files / "all")):
        if not folder.is_dir():
            folder.mkdir()
            chosen.prepare(folder, tuning)
    chosen.prepare(files / "all", False)
    ending = chosen.test.suffix  # type: ignore[attr-defined]
    # Train without the questions that the searches look at; test on those of the study.
    data: dict[str, Any] = {"source": str(files / "tuning" / f"train{ending}")}
    data |= {"validation": str(files / "tuning" / f"test{ending}"), "test": str(files / "all" / f"test{ending}")}
    if chosen.name == "e2e":
        data |= {"prompt": "text", "separator": "||", "template": "{prompt} ||", "batch_size": 8}
        model, data_class = "lightning_peft.tasks.LanguageModel", "lightning_peft.data.GenerationData"
    else:
        data |= {"label": "category", "batch_size": 16, "max_length": 24}
        model, data_class = "benchmarks.real.banking77.Classifier", "lightning_peft.data.TextClassificationData"
    path = chosen.model  # type: ignore[attr-defined]
    return {
        "model": {"class_path": model, "init_args": {"model": path, "lr": 1e-3}},
        "data": {"class_path": data_class, "init_args": data},
        "trainer": {"accelerator": "cpu", "max_steps": chosen.steps, "logger": False},
    }


def _methods(chosen: Study) -> dict[str, Any]:
    rows = {row.label: {"method": row.method, **row.arguments} for row in chosen.rows if row.method and not row.probe}
    common = {"trainable": ["classifier"]} if chosen.name == "banking77" else {}
    return {"common": common, "methods": {**rows, **MORE}}


def _retention(chosen: Study, files: Path) -> Path:
    path = files / "retention.yaml"
    model, stories = chosen.model, str(files / "stories.txt")  # type: ignore[attr-defined]
    arguments = {"source": stories, "validation": stories, "tokenizer": model, "batch_size": 8, "max_length": 64}
    path.write_text(yaml.safe_dump({"class_path": "lightning_peft.data.LanguageModelData", "init_args": arguments}))
    return path


def features(module: L.LightningModule, batch: Any) -> Tensor:
    """The mean of an encoder's last hidden states over the tokens of each text, as MiniLM was trained."""
    network: Any = module.model
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden = network.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


if __name__ == "__main__":
    main(sys.argv[1:])
