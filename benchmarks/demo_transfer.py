"""Measure the effect of the demo model's pretraining: LoRA, a frozen base, random weights, full fine-tuning.

    python -m benchmarks.demo_transfer --seeds 3

Prints the validation and test accuracy of each variant after 6 epochs on the demo's 1,618 labelled passages, and the
time, for each seed. The numbers in ``docs/demo.md`` are from this benchmark.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings

import lightning as L
import torch

import lightning_peft as lp
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassifier

# For each variant: whether the base is pretrained, which parts train in full (None means LoRA and the classifier), and
# the learning rate. The rates are common defaults and were not searched; LoRA has the same one on both bases.
VARIANTS: dict[str, tuple[bool, list[str] | None, float]] = {
    "lora": (True, None, 3e-3),
    "classifier only": (True, ["classifier"], 1e-2),
    "head and classifier": (True, ["head", "classifier"], 5e-3),
    "lora on random weights": (False, None, 3e-3),
    "full": (True, ["model", "head", "classifier"], 1e-3),
}


def run(variant: str, seed: int, epochs: int) -> dict[str, float]:
    """Train one variant; return its accuracies in percent, its trainable parameters, and seconds of training."""
    pretrained, parts, lr = VARIANTS[variant]
    L.seed_everything(seed, verbose=False)
    module = TextClassifier("demo", pretrained=pretrained, lr=lr)
    callbacks: list[L.Callback] = []
    if parts is None:
        callbacks.append(lp.LoRA(r=8, alpha=16, targets="all-linear", trainable=["classifier"]))
    else:
        module.model.requires_grad_(False)
        for part in parts:
            module.model.get_submodule(part).requires_grad_(True)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextClassificationData("demo", batch_size=32)
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    trainer.limit_val_batches = 1.0
    (validation,) = trainer.validate(module, data, verbose=False)
    (test,) = trainer.test(module, data, verbose=False)
    return {
        "validation": 100 * validation["val/acc"],
        "test": 100 * test["test/acc"],
        "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "seconds": seconds,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (0, 1, …) per variant")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print("| variant | trainable | validation | mean | test | mean | s |\n|---|---|---|---|---|---|---|")
    for variant in args.variants:
        results = [run(variant, seed, args.epochs) for seed in range(args.seeds)]
        cells = [f"{results[0]['parameters']:,.0f}"]
        for split in ("validation", "test"):
            scores = [result[split] for result in results]
            cells += [" ".join(f"{score:.1f}" for score in scores), f"{statistics.mean(scores):.1f}"]
        cells.append(f"{statistics.mean(result['seconds'] for result in results):.0f}")
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
