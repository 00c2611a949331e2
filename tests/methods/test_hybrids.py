"""Several methods on one model: one base, one checkpoint, exact resume, a merge that names what it leaves unmerged."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import adapter_names, hosts
from tests.helpers import assert_same_bits, bits, perturb
from tests.methods.fitting import fitted
from tests.methods.tiny import llama

HEAD = ["model.score"]


class Classifier(L.LightningModule):
    """A small Llama that classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"body": llama().model, "score": nn.Linear(32, 3)})

    def forward(self, ids: Tensor) -> Tensor:
        return self.model["score"](self.model["body"](input_ids=ids).last_hidden_state.mean(1))

    def training_step(self, batch, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def lora_prefix() -> list[lp.PEFTMethod]:
    return [
        lp.LoRA(r=2, targets=["gate_proj", "up_proj", "down_proj"], name="lora", trainable=HEAD),
        lp.PrefixTuning(4, name="prefix"),
    ]


def mam() -> list[lp.PEFTMethod]:
    return [
        lp.PrefixTuning(4, bottleneck_size=8, name="prefix"),
        lp.BottleneckAdapter("scaled_parallel", bottleneck_size=4, name="ffn", trainable=HEAD),
    ]


def unipelt() -> list[lp.PEFTMethod]:
    return [
        lp.GatedLoRA(r=2, alpha=2, targets=["q_proj", "v_proj"], name="lora"),
        lp.BottleneckAdapter("pfeiffer", bottleneck_size=4, gate=True, name="adapter"),
        lp.PrefixTuning(3, gate=True, name="prefix", trainable=HEAD),
    ]


def prompt_and_last_block() -> list[lp.PEFTMethod]:
    return [lp.PromptTuning(3, init="random", name="prompt"), lp.LastLayers(1, name="top", trainable=HEAD)]


def layer_ranges() -> list[lp.PEFTMethod]:
    return [
        lp.IA3(exclude=["layers.1", "layers.2"], name="bottom"),
        lp.LoRA(r=2, targets=["*.layers.1.*_proj"], name="middle"),
        lp.BottleneckAdapter(targets=["layers.2.mlp"], bottleneck_size=4, name="top", trainable=HEAD),
    ]


#: each with the adapters that a merge includes
HYBRIDS: dict[Callable[[], list[lp.PEFTMethod]], set[str]] = {
    lora_prefix: {"lora"},
    mam: set(),
    unipelt: set(),
    prompt_and_last_block: set(),
    layer_ranges: {"bottom", "middle"},
}
IDS = torch.arange(40).view(8, 5) * 7 % 99 + 1
DATA = TensorDataset(IDS, torch.arange(8) % 3)
over_hybrids = pytest.mark.parametrize("methods", HYBRIDS, ids=lambda make: make.__name__)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


def adapted(methods: Callable[[], list[lp.PEFTMethod]]) -> Classifier:
    model = Classifier().eval()
    lp.apply(model, *methods())
    return perturb(model)  # type: ignore[return-value]


@over_hybrids
def test_each_method_takes_part_and_the_order_of_the_callbacks_trains_the_same(methods):
    model, plain = adapted(methods), Classifier().eval()
    whole = output(model)
    names = adapter_names(model)
    for name in names:
        with lp.active(model, *[n for n in names if n != name]):
            assert (output(model) - whole).abs().max() > 1e-4, name
    with lp.disabled(model):
        torch.testing.assert_close(output(model), output(plain), rtol=1e-5, atol=1e-5)
    other = Classifier()
    lp.apply(other, *reversed(methods()))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in other.named_parameters() if p.requires_grad}


@over_hybrids
def test_one_frozen_base_one_checkpoint_and_an_exact_resume(methods, tmp_path):
    def fit(epochs: int, ckpt_path: str | None = None) -> tuple[L.Trainer, Classifier]:
        L.seed_everything(0, verbose=False)
        model = Classifier()
        loader = DataLoader(DATA, 4, shuffle=True)
        return fitted(model, methods(), epochs, loader, ckpt_path=ckpt_path), model

    _, whole = fit(2)
    trainer, half = fit(1)
    path = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert stored["state_dict"].keys() == lp.adapter_state(half).keys()
    assert [m["config"]["name"] for m in stored["lightning_peft"]["methods"]] == [m.name for m in methods()]
    base, trained = bits(Classifier()), lp.adapter_state(whole).keys()
    assert_same_bits(bits(whole, base.keys() - trained), {k: v for k, v in base.items() if k not in trained})
    _, resumed = fit(2, path)
    assert_same_bits(lp.adapter_state(resumed), lp.adapter_state(whole))
    assert torch.equal(output(lp.load_from_checkpoint(Classifier, path)), output(half))


@over_hybrids
def test_one_merge_folds_what_can_be_folded_and_names_the_rest(methods):
    model, folds = adapted(methods), HYBRIDS[methods]
    expected, before = output(model), bits(model)
    rest = set(adapter_names(model)) - folds
    with pytest.raises(lp.MergeError) as refused:
        lp.merge(model)
    assert all(f"'{name}'" in str(refused.value) for name in rest)
    assert_same_bits(bits(model), before)
    if not folds:
        with pytest.raises(lp.MergeError, match="does not change weights"):
            lp.merge(model, partial=True)
        return
    left = lp.merge(model, partial=True)
    assert len(left) == len(rest)
    assert all(any(f"'{name}'" in line for line in left) for name in rest)
    assert {n for _, host in hosts(model) for n in host.adapters.merged_names} == folds
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)
    assert torch.equal(output(model), expected)


def test_a_folded_mam_is_a_mam_with_direct_prefixes():
    model = adapted(mam)
    expected, before = output(model), sum(p.numel() for p in model.parameters())
    lp.fold(model)
    torch.testing.assert_close(output(model), expected)
    assert sum(p.numel() for p in model.parameters()) < before


def test_a_gate_is_the_papers():
    layer = nn.Linear(6, 4)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    lp.apply(model, lp.GatedLoRA(r=2, alpha=3, targets=["0"]))
    perturb(model)
    adapter, x = layer.adapters["default"], torch.randn(5, 3, 6)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    gate = torch.sigmoid(x @ adapter.gate.weight[0] + adapter.gate.bias)
    update = 1.5 * (x @ adapter.lora_A.T @ adapter.lora_B.T)
    torch.testing.assert_close(layer(x), plain + gate[..., None] * update)
