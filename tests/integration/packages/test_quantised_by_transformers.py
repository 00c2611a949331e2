"""Models that transformers itself quantises or loads quantised: a run, its checkpoint, and the merged model on disk."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.core.targeting.packed import is_packed
from tests.helpers import close, perturb

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(12).view(2, 6)
GROUP = 32


def config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config()).save_pretrained(path)
    return path


def packed_folder(folder: Path, quantisation: Any, tensors: Callable[[int, int], dict[str, torch.Tensor]]) -> Path:
    """A directory of the same model with random packed weights."""
    path = folder / str(quantisation["quant_method"]).lower()
    path.mkdir(exist_ok=True)
    described = config()
    described.quantization_config = quantisation
    described.save_pretrained(path)
    state = {}
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            state |= {f"{name}.{k}": v for k, v in tensors(module.in_features, module.out_features).items()}
        else:
            state |= {f"{name}.{k}": v.data for k, v in module._parameters.items() if v is not None}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) / 200).half()


def load(folder: Path, quantisation: Any = None, **options: Any) -> Any:
    if quantisation is not None:
        options["quantization_config"] = quantisation
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def bitsandbytes(folder: Path, **bits: Any) -> Any:
    return load(folder, transformers.BitsAndBytesConfig(**bits), device_map="cpu")


def torchao(folder: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return load(folder, transformers.TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu")


def gptq(folder: Path) -> Any:
    def tensors(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        return {
            "qweight": codes(inputs // 8, outputs),
            "qzeros": codes(inputs // GROUP, outputs // 8) & 0x66666666,
            "scales": scales(inputs // GROUP, outputs),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    found = transformers.GPTQConfig(bits=4, group_size=GROUP, sym=False, backend="gptq_torch")
    path = packed_folder(folder, {**found.to_dict(), "checkpoint_format": "gptq"}, tensors)
    return load(path, found, dtype=torch.float32)


def awq(folder: Path) -> Any:
    def tensors(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        return {
            "qweight": codes(inputs, outputs // 8),
            "qzeros": codes(inputs // GROUP, outputs // 8),
            "scales": scales(inputs // GROUP, outputs),
        }

    found = transformers.AwqConfig(bits=4, group_size=GROUP, backend="torch_awq")
    return load(packed_folder(folder, found.to_dict(), tensors), dtype=torch.float32)


#: a function that loads the model, and the package that it needs
KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bitsandbytes nf4": (
        lambda f: bitsandbytes(f, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "bitsandbytes",
    ),
    "bitsandbytes int8": (lambda f: bitsandbytes(f, load_in_8bit=True), "bitsandbytes"),
    "torchao int8": (torchao, "torchao"),
    "quanto int8": (lambda f: load(f, transformers.QuantoConfig(weights="int8")), "optimum.quanto"),
    "quanto int4": (lambda f: load(f, transformers.QuantoConfig(weights="int4")), "optimum.quanto"),
    "gptq": (gptq, "gptqmodel"),
    "awq": (awq, "gptqmodel"),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


@pytest.fixture(params=KINDS)
def make(request, folder, monkeypatch) -> Callable[[], Any]:
    loader, package = KINDS[request.param]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    if package == "gptqmodel":  # its layers compile themselves, which takes minutes
        monkeypatch.setattr("gptqmodel.nn_modules.qlinear.torch.torch_compile", lambda function, **_: function)
    return lambda: loader(folder)


class Module(L.LightningModule):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.model = make()

    def forward(self, tokens):
        return self.model(tokens).logits.float()

    def training_step(self, batch, index):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def written(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def test_a_run_its_files_and_the_merged_model(make, tmp_path):
    module = Module(make)
    layer = module.model.model.layers[0].self_attn.q_proj
    kind, before = type(layer), module.eval()(TOKENS).detach()
    module.train()
    data = DataLoader(torch.randint(0, 32, (12, 6), generator=torch.Generator().manual_seed(1)), 4)
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_steps=3, accelerator="cpu", callbacks=[lp.LoRA(r=2), saving], **quiet).fit(module, data)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert len(state) == 28
    assert all(".adapters." in key for key in state)
    y = module.eval()(TOKENS)
    assert (y - before).abs().max() > 1e-2
    again = lp.load_from_checkpoint(Module, tmp_path / "last.ckpt", make=make)
    assert torch.equal(again.eval()(TOKENS), y)

    lp.save_adapter(module, tmp_path / "adapter")
    other = make()
    lp.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.eval()(TOKENS).logits.float(), y)
    with pytest.raises(lp.StateError, match="it has no quantised layers, but the state was trained on a base with 14"):
        lp.load_adapter(transformers.LlamaForCausalLM(config()), tmp_path / "adapter")

    with pytest.raises(lp.MergeError, match="has a quantised weight"):
        lp.merge(other)
    loaded = dict(vars(other)), dict(vars(other.config))
    lp.merge(other, dequantize=True)
    close(other(TOKENS).logits.float(), y, 1e-2)
    lp.unmerge(other)
    now = dict(vars(other)), dict(vars(other.config))
    assert [{k: id(v) for k, v in d.items()} for d in now] == [{k: id(v) for k, v in d.items()} for d in loaded]
    assert torch.equal(other(TOKENS).logits.float(), y)
    lp.unload(other, merge=True, dequantize=True)
    assert not any(map(is_packed, other.modules()))
    other.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in written(tmp_path / "merged")
    plain = load(tmp_path / "merged").eval()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    close(plain(TOKENS).logits.float(), y, 1e-2)

    lp.unload(module)
    assert type(layer) is kind
    assert torch.equal(module(TOKENS), before)


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8"])
def test_layers_that_stay_quantised_are_told_from_merged_ones(name, folder, tmp_path):
    loader, package = KINDS[name]
    pytest.importorskip(package)
    model = loader(folder)
    lp.apply(model, lp.LoRA(r=2, targets="q_proj"))
    perturb(model)
    y = model.eval()(TOKENS).logits
    lp.merge(model, dequantize=True)
    lp.unmerge(model)
    lists = vars(model.config.quantization_config)
    assert not lists.get("modules_to_not_convert")
    assert not lists.get("llm_int8_skip_modules")
    lp.unload(model, merge=True, dequantize=True)
    model.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    attention = again.model.layers[1].self_attn
    assert [is_packed(m) for m in (attention.q_proj, attention.k_proj, again.lm_head)] == [False, True, False]
    close(again(TOKENS).logits, y, 1e-5)


def test_a_configuration_without_a_list_of_plain_layers_is_warned_of():
    model = transformers.LlamaForCausalLM(config())
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.q_proj, layer.self_attn.k_proj = (Packed(64, n) for n in (64, 32))

    class Method:
        pass

    class Quantizer:
        quantization_config = Method()

    model.hf_quantizer, model.config.quantization_config = Quantizer(), Quantizer.quantization_config
    lp.apply(model, lp.LoRA(r=2, targets="q_proj"))
    with pytest.warns(UserWarning, match="2 layers of LlamaForCausalLM stay quantised, and Method has no list"):
        lp.merge(model, dequantize=True)
    assert model.config.quantization_config is Quantizer.quantization_config


class Packed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("codes", torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes.float() / 50)


def test_compressed_tensors_are_refused_with_the_way_out(folder, tmp_path):
    """Its layers unpack themselves in the first forward, and are packed again when they are saved."""
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    described = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }

    def tensors(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": codes(outputs, inputs // 8),
            "weight_scale": scales(outputs, inputs // GROUP),
            "weight_shape": torch.tensor([outputs, inputs]),
        }

    path = packed_folder(folder, described, tensors)
    model = load(path, dtype=torch.float32)
    for _ in range(2):
        with pytest.raises(lp.TargetError, match=r"q_proj' belongs to compressed-tensors.*\(dequantize=True\)"):
            lp.apply(model, lp.LoRA(r=2))
        y = model(TOKENS).logits
    lp.apply(model, lp.NormTuning())
    plain = load(path, transformers.CompressedTensorsConfig(dequantize=True), dtype=torch.float32)
    close(plain(TOKENS).logits, y, 1e-2)
    lp.apply(plain, lp.LoRA(r=2))
    perturb(plain)
    y = plain(TOKENS).logits
    lp.unload(plain, merge=True)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in written(tmp_path)
    close(load(tmp_path)(TOKENS).logits, y)
