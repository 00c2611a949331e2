"""``lightning-peft export --for``: other software computes what the adapted model does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import console
import pytest
import torch
from modules import Module
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.formats.deploy.programs import program_of
from tests.helpers import perturb
from tests.methods import tiny

IDS = torch.arange(12).view(2, 6) + 5


def adapter(*methods: lp.PEFTMethod, **options: bool) -> nn.Module:
    """A small Llama in ``base/`` and a trained adapter in ``adapter/``."""
    model = tiny.llama(**options)
    model.save_pretrained("base")
    lp.apply(model, *methods)
    perturb(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.data += 0.1
    lp.save_adapter(model, "adapter")
    return model.eval()


def export(*args: str, out: str = "out") -> str:
    return console.run("export", "adapter", out, "--base=base", *args)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def as_vllm() -> nn.Module:
    """The base with the adapter in ``out/``, as vLLM computes it: W + alpha / r B A, nothing else of the options."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("base")
    config, tensors = (
        json.loads(Path("out/adapter_config.json").read_text()),
        load_file("out/adapter_model.safetensors"),
    )
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert a.shape[0] == b.shape[1] == config["r"]
        model.get_submodule(name).weight.data += config["lora_alpha"] / config["r"] * b @ a
    return model


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        (lp.LoRA(r=4, alpha=6, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}), 4),
        (lp.LoRA(r=4, use_rslora=True, targets=["q_proj"]), 4),
        (lp.LoRA(r=2, init="pissa", targets=["q_proj"]), 4),
        (lp.LoHa(r=2, targets=["q_proj", "down_proj"]), 4),
        (lp.DoRA(r=4, targets=["q_proj", "v_proj"]), None),
        (lp.OFT(block_size=4, targets=["q_proj"]), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_vllm_loads_a_plain_lora_of_any_weight_method(method: lp.PEFTMethod, rank: int | None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = logits(adapter(method))
    said = export("--for=vllm", "--max-error=1e-4")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert rank in (None, config["r"])
    assert f"rank {config['r']}, relative error" in said
    assert "--max-lora-rank" in said
    torch.testing.assert_close(logits(as_vllm()), expected, rtol=1e-3, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained("base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, "out")), expected, rtol=1e-3, atol=1e-3)


def test_the_rank_follows_from_the_error_and_an_error_above_the_limit_is_refused():
    model = adapter(lp.OFT(block_size=8, targets=["q_proj", "down_proj"]))
    deltas = {}
    base = tiny.llama()
    base.load_state_dict(type(base).from_pretrained("base").state_dict())
    lp.merge(model)
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            deltas[name] = model.get_submodule(name).weight.detach() - module.weight.detach()
    with pytest.raises(SystemExit, match=r"rank 2 has a relative error of .*more than 0.01.*--max-error"):
        export("--for=vllm", "--rank=2")
    assert not Path("out").exists()
    said = export("--for=vllm", "--max-error=0.3")
    wide = {name: torch.linalg.svdvals(delta.double()) for name, delta in deltas.items()}
    total = sum(float(s.square().sum()) for s in wide.values())
    errors = [math.sqrt(sum(float(s[k:].square().sum()) for s in wide.values()) / total) for k in range(33)]
    rank = next(k for k, error in enumerate(errors) if error <= 0.3)
    assert f"rank {rank}, relative error {errors[rank]:.3g}" in said


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            [lp.LoRA(r=2, targets=["q_proj"], trainable=["lm_head"])],
            r"lm_head.* is a trained parameter of the base.*--merged",
        ),
        ([lp.PrefixTuning(num_virtual_tokens=2)], r"does not change weights.*--merged"),
        ([lp.LoRA(r=2, targets=["q_proj"], bias="all")], r"bias='all': vLLM does not load biases"),
        ([lp.LoRA(r=2, name="a"), lp.LoRA(r=2, name="b")], r"active adapters.*--name"),
    ],
    ids=["head", "prefix", "bias", "two"],
)
def test_what_vllm_cannot_load_is_refused_with_the_reason(methods: list[lp.PEFTMethod], message: str):
    adapter(*methods, attention_bias=True)
    with pytest.raises(SystemExit, match=message):
        export("--for=vllm")
    assert not Path("out").exists()


def test_the_merged_model_is_a_folder_that_transformers_loads():
    from transformers import AutoModelForCausalLM

    expected = logits(adapter(lp.LoRA(r=2, targets=["q_proj"], trainable=["lm_head"])))
    assert "vllm serve out" in export("--for=vllm", "--merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("out")), expected)


def _llama_cpp_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key: llama.cpp rotates entries 2i and 2i + 1 of a head, transformers i and i + size / 2."""
    size = len(weight) // heads
    rows = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def test_llama_cpp_reads_a_lora_for_the_weights_in_its_own_order():
    gguf = pytest.importorskip("gguf")
    model = adapter(lp.LoHa(r=2, targets=["q_proj", "k_proj", "down_proj"]))
    said = export("--for=llama.cpp", out="lora.gguf")
    assert "rank 4, relative error" in said
    base = type(model).from_pretrained("base")
    lp.merge(model)
    reader = gguf.GGUFReader("lora.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.type"] == "adapter"
    assert facts["general.architecture"] == "llama"
    assert facts["adapter.type"] == "lora"
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(found) == 2 * 3 * 3
    for ours, theirs, heads in (
        ("self_attn.q_proj", "attn_q", 4),
        ("self_attn.k_proj", "attn_k", 2),
        ("mlp.down_proj", "ffn_down", 0),
    ):
        name = f"model.layers.1.{ours}"
        delta = model.get_submodule(name).weight.detach() - base.get_submodule(name).weight
        expected = _llama_cpp_order(delta, heads) if heads else delta
        a, b = (found[f"blk.1.{theirs}.weight.lora_{which}"] for which in "ab")
        torch.testing.assert_close(facts["adapter.lora.alpha"] / len(a) * b @ a, expected, rtol=1e-3, atol=1e-4)


def test_what_llama_cpp_cannot_load_is_refused():
    pytest.importorskip("gguf")
    adapter(lp.LoRA(r=2, targets=["embed_tokens"]))
    with pytest.raises(SystemExit, match=r"llama.cpp cannot load .*embed_tokens.*linear layers only"):
        export("--for=llama.cpp", out="lora.gguf")
    with pytest.raises(SystemExit, match=r"must end with .gguf"):
        export("--for=llama.cpp")
    assert not Path("lora.gguf").exists()
    assert "convert_hf_to_gguf.py out" in export("--for=llama.cpp", "--merged")


def test_the_program_of_a_hugging_face_model_returns_its_logits():
    model = tiny.llama()
    program = program_of(model, model)
    assert program.names == ["input_ids", "attention_mask"]
    torch.testing.assert_close(program(IDS, torch.ones_like(IDS)), logits(model))


def test_programs_compute_the_outputs_of_a_module_of_ones_own(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    module = Module()
    lp.apply(module, lp.LoRA(r=2))
    lp.save_adapter(perturb(module), "adapter")
    with pytest.raises(SystemExit, match="example_input_array"):
        console.run("export", "adapter", "model.onnx", "--model=modules.Module", "--for=onnx")
    monkeypatch.setattr(Module, "example_input_array", torch.randn(2, 16), raising=False)
    x = torch.randn(5, 16)
    expected = module.eval()(x).detach()
    said = console.run("export", "adapter", "model.onnx", "--model=modules.Module", "--for=onnx")
    assert "for any batch size; onnxruntime computes the same outputs" in said
    session = onnxruntime.InferenceSession("model.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)
    said = console.run("export", "adapter", "model.pt2", "--model=modules.Module", "--for=torch-export")
    assert "for any batch size; torch.export.load computes the same outputs" in said
    torch.testing.assert_close(torch.export.load("model.pt2").module()(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank=4"], "--rank only has an effect with --for vllm or llama.cpp"),
        (["--for=vllm", "--merged", "--max-error=0.1"], "--max-error only has an effect"),
        (["--for=onnx", "--merged"], "--merged only has an effect with --for vllm or llama.cpp"),
        (["--for=vllm", "--fold-scale"], "--fold-scale only has an effect without --for"),
    ],
)
def test_an_option_without_effect_is_refused(options: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        console.run("export", "adapter", "out", *options)


def test_a_merged_model_that_hugging_face_cannot_load_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    module = Module()
    lp.apply(module, lp.LoRA(r=2, targets="all-linear", exclude=()))
    lp.save_adapter(module, "adapter")
    with pytest.raises(SystemExit, match="the merged model is not a Hugging Face model"):
        console.run("export", "adapter", "out", "--model=modules.Module", "--for=vllm", "--merged")
    assert not Path("out").exists()
