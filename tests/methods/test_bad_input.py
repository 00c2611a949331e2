"""Arguments that do not fit the model: a clear error when fit starts, before any step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_peft as lp
from tests.kinds import KINDS
from tests.methods.tiny import Classifier, bert, trainer


class Around(L.LightningModule):
    """Any network; counts the steps that training takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.steps = 0

    def training_step(self, batch: Any, index: int) -> None:
        self.steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return Classifier().train_dataloader()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], lp.PEFTMethod], str]] = {
    "prefix without attention": (
        KINDS["resnet"].build,
        lambda: lp.PrefixTuning(4),
        "targets='all-attention' finds no attention: no module here has key and value projections.*pass kv_dim=",
    ),
    "prompt as long as the positions": (
        bert,
        lambda: lp.PromptTuning(64),
        r"64 virtual tokens leave no room for text: .*\(BertModel\) has 64 positions. Lower num_virtual_tokens",
    ),
    "P-tuning as long as the positions": (bert, lambda: lp.PTuning(80), "80 virtual tokens leave no room"),
    "reduction factor that leaves no width": (
        bert,
        lambda: lp.BottleneckAdapter(reduction_factor=64),
        "reduction_factor=64 is larger than the 32 features of .*: lower it, or set bottleneck_size",
    ),
    "schedule past the last block": (
        bert,
        lambda: lp.GradualUnfreezing(schedule=[1, 2, 3, 4, 5, 6], trainable=["classifier"]),
        r"schedule=\[1, 2, 3, 4, 5, 6\] goes past the last block: it has 6 entries, and Around has 4 to unfreeze",
    ),
    "more last layers than blocks": (bert, lambda: lp.LastLayers(9), "n=9, but Around has 3 blocks"),
    "target rank above the initial": (
        bert,
        lambda: lp.AdaLoRA(target_r=8, init_r=4),
        "target_r=8 is above init_r=4: the rank can only fall; raise init_r",
    ),
    "ranks with no steps to fall": (
        bert,
        lambda: lp.AdaLoRA(target_r=1, init_r=2, tinit=2, tfinal=2),
        "tinit=2 and tfinal=2 leave none of the 3 optimizer steps",
    ),
    "text without a tokenizer": (
        bert,
        lambda: lp.PromptTuning(4, init="text", init_text="Is it good?"),
        "init='text' needs a tokenizer: set tokenizer to the folder or hub id of the model's tokenizer",
    ),
    "class names without a tokenizer": (
        bert,
        lambda: lp.PromptTuning(4, init="labels", init_text=["good", "bad"]),
        "init='labels' needs a tokenizer",
    ),
    "rank above the matrix": (bert, lambda: lp.LoRA(r=64, targets=["query"]), "r=64 is above both sides of"),
    "blocks with other inputs than patches": (
        KINDS["resnet"].build,
        lambda: lp.VisualPromptTuning(4),
        "targets='blocks' finds no repeated blocks with attention",
    ),
    "biases where there are none": (KINDS["llama"].build, lambda: lp.BitFit(), "finds no bias in Around"),
    "a gate on a convolution": (
        KINDS["conv2d"].build,
        lambda: lp.GatedLoRA(targets=["type:Conv2d"], r=2),
        "GatedLoRA adapts linear layers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_stops_fit_before_its_first_step(case: str):
    network, method, message = CASES[case]
    module = Around(network())
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer(".", method()).fit(module)
    assert module.steps == 0
