"""``lightning-peft export --for``: other software computes what the adapted model does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import console
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_peft as lp
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


def export(*args: str) -> str:
    return console.run("export", "adapter", "out", "--base=base", *args)


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
