"""Modules of other packages in which adapters once failed or had no effect, silently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers import close, perturb
from tests.integration.packages.table import CASES
from tests.integration.packages.test_packages import fit, installed


def module_of(name: str) -> nn.Module:
    installed(CASES[name].package)
    return CASES[name].module().eval()


REFUSED = {
    "prefix, timm Swin": ("timm SwinTransformer", lp.PrefixTuning, "WindowAttention ran without calling"),
    "prefix, torchvision Swin": ("torchvision SwinTransformer", lp.PrefixTuning, "ShiftedWindowAttention ran without"),
    "prefix, MONAI SABlock": ("MONAI ViT", lp.PrefixTuning, "SABlock ran without calling"),
    "prompts, timm Swin": (
        "timm SwinTransformer",
        lp.VisualPromptTuning,
        r"SwinTransformerStage was called with \(2, 8",
    ),
    "prompts, timm EVA-02": ("timm Eva", lp.VisualPromptTuning, "EvaBlock was called with rope of shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_of_the_first_forward_appear_at_injection(case: str) -> None:
    name, method, why = REFUSED[case]
    module = module_of(name)
    with pytest.raises(ValueError, match=f"in a trial forward: {why}"):
        lp.apply(module, method(2))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(("name", "weight"), [("timm Eva", "attn.qkv"), ("torchvision SwinTransformer", "attn.qkv")])
def test_a_weight_that_the_attention_reads_is_adapted(name: str, weight: str) -> None:
    module = module_of(name)
    base = CASES[name].output(module)
    lp.apply(module, lp.LoRA(r=2, targets=weight))
    perturb(module, scale=0.5)
    adapted = CASES[name].output(module)
    assert (adapted - base).abs().max() > 1e-3 * base.abs().max()
    lp.merge(module)
    close(CASES[name].output(module), adapted, 1e-4)


@pytest.mark.parametrize("name", ["timm EfficientNet", "timm ResNet", "timm ConvNeXt", "torchvision ResNet"])
def test_the_report_notes_parameters_that_default_lora_does_not_reach(name: str) -> None:
    report = lp.inspect(module_of(name), lp.LoRA(r=2))
    assert "does not reach" in report.__rich__().caption
    assert "Conv2d" in report.__rich__().caption


def test_a_head_of_zeros_on_a_trained_base_is_named(tmp_path: Path) -> None:
    case = CASES["torchvision VisionTransformer"]
    module = module_of("torchvision VisionTransformer")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".heads." not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    with pytest.raises(lp.AuditError, match=r"output head 'model.heads.head' is frozen.*trainable=\['head'\]"):
        fit(case, module, lp.LoRA(r=2), tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", "type:Linear", "lin_l"])
def test_linear_layers_of_graphs_are_found(targets: str) -> None:
    module = module_of("PyG GraphSAGE")
    report = lp.apply(module, lp.LoRA(r=2, targets=targets))
    assert "model.convs.0.lin_l" in report.modules


def test_a_typed_linear_layer_is_named_and_adapted_per_type() -> None:
    installed("torch-geometric")
    from torch_geometric.nn import HeteroLinear

    model = nn.ModuleDict({"typed": HeteroLinear(4, 6, 3), "other": nn.Linear(4, 4), "head": nn.Linear(4, 4)}).double()
    notes = lp.inspect(model, lp.LoRA(r=2)).notes
    assert any("leaves out typed.weight (HeteroLinear)" in note for note in notes)
    lp.apply(model, lp.LoRA(r=2, alpha=4, targets="typed.weight", adapter_dtype="float64"))
    perturb(model, scale=0.5)
    x, kinds = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2])
    layer = model["typed"]
    adapter = layer.adapters["default"].weights()["weight"]
    dense = (layer._parameters["weight"] + 2 * adapter.lora_B @ adapter.lora_A)[kinds]
    close(layer(x, kinds), torch.einsum("bi,bio->bo", x, dense) + layer.bias[kinds], 1e-12)


class Mixed(nn.Module):
    """Mixes the outputs of its blocks with weights in a ``ParameterList``, as COMET's encoders do."""

    def __init__(self, mix: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.mix = mix
        if mix is None:
            self.scales = nn.ParameterList(torch.zeros(1) for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        if self.mix is not None:
            return self.head(self.mix(outputs, torch.ones(x.shape[:2]))[:, 0])
        weights = torch.cat(list(self.scales)).softmax(0)
        return self.head(sum(weight * output for weight, output in zip(weights, outputs))[:, 0])


@pytest.mark.parametrize("real", [False, True])
def test_the_last_layers_of_a_model_with_a_parameter_list_are_saved_and_read(real: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        if not real:
            return Mixed()
        installed("unbabel-comet")
        return Mixed(pytest.importorskip("comet.modules").LayerwiseAttention(3, layer_norm=False))

    model, x = build().eval(), torch.randn(2, 5, 8)
    lp.apply(model, lp.LastLayers(1))
    perturb(model)
    lp.save_adapter(model, tmp_path)
    again = build().eval()
    lp.load_adapter(again, tmp_path)
    close(again(x), model(x))


def test_hyperparameters_that_are_objects_are_passed_again(tmp_path: Path) -> None:
    case = CASES["pytorch-forecasting NBeats"]
    installed(case.package)
    module = case.module()
    path = fit(case, module, lp.LoRA(r=2), tmp_path)
    for options, why in (({}, "would run"), ({"weights_only": False}, "dataset_parameters=... in Python")):
        with pytest.raises(lp.StateError, match=why):
            lp.load_from_checkpoint(type(module), path, **options)
