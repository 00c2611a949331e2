"""Tensors without elements are saved if the module has none either; otherwise the error says why they are empty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.trainer.checkpoints.trimming import trim_state
from tests.trainer.toys import Toy, loader, lora, trainer


class Empty(Toy):
    """A table without columns, as tabular models have for a data set without numbers."""

    def build(self) -> None:
        super().build()
        self.numbers = nn.Linear(0, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.numbers(x[:, :0]))


@pytest.mark.parametrize("make", [lp.FullFineTuning, lambda: lora(trainable=["head", "numbers"])])
def test_parameters_without_elements_are_saved(tmp_path: Path, make) -> None:
    torch.manual_seed(0)
    module, run = Empty(), trainer(tmp_path, method=make())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    lp.save_adapter(module, tmp_path / "adapter")
    torch.manual_seed(0)
    from_checkpoint = lp.load_from_checkpoint(Empty, tmp_path / "x.ckpt")
    torch.manual_seed(0)
    from_directory = Empty()
    lp.load_adapter(from_directory, tmp_path / "adapter")
    x = next(iter(loader()))[0]
    for loaded in (from_checkpoint, from_directory):
        torch.testing.assert_close(loaded.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("sharded", "why"), [(True, "the model is sharded"), (False, r"shape \(\d+, \d+\) in the mod")]
)
def test_the_error_says_why_a_tensor_is_empty(sharded: bool, why: str) -> None:
    module = Toy()
    lp.apply(module, lora())
    state = lp.adapter_state(module)
    key = next(key for key in state if key.endswith("lora_A"))
    if sharded:
        module.head.weight.ds_id = 0  # as DeepSpeed's ZeRO marks its parameters
    with pytest.raises(lp.StateError, match=why):
        trim_state(module, {**state, key: torch.zeros(0)}, state.keys())


def test_a_partitioned_tensor_is_not_saved_as_an_adapter(tmp_path: Path) -> None:
    module = Toy()
    lp.apply(module, lora())
    module.head.weight.ds_id = 0
    module.head.weight.data = torch.zeros(0)  # the values are held by another process
    with pytest.raises(lp.StateError, match=r"head\.weight cannot be saved: the model is sharded"):
        lp.save_adapter(module, tmp_path)
