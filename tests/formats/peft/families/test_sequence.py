"""Prompts and prefixes are exchanged with PEFT both ways, and the logits agree."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lightning_peft as lp
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.files import read_files, write_files
from lightning_peft.formats.load import load_adapter
from lightning_peft.formats.save import save_adapter
from tests.formats import models
from tests.formats.models import Wrapped, adapted, close, made_by_peft, moved, read_by_peft, tokens


def t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def gpt2_classifier() -> nn.Module:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "num_labels": 3}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0)).eval()


def multi_query() -> nn.Module:
    return models.llama(num_key_value_heads=1, num_hidden_layers=3)


TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM",
         "gpt2_classifier": "SEQ_CLS", "multi_query": "CAUSAL_LM"}  # fmt: skip


def build(name: str) -> nn.Module:
    """Build a model with weights so large that every token affects the logits."""
    return moved(globals()[name]() if name in globals() else getattr(models, name)())


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of the real tokens, which are padded on the right."""
    mask = torch.ones_like(x)
    mask[1, -2:] = 0
    given = {"input_ids": x, "attention_mask": mask}
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if "T5" in type(base).__name__:
        given["decoder_input_ids"] = x[:, :4]
    with torch.no_grad():
        out = model(**given).logits
    return out if out.ndim == 2 or "T5" in type(base).__name__ else out[:, -x.shape[1] :][mask.bool()]


def ours_there_and_back(base: nn.Module, method: lp.PEFTMethod, folder: Path, peft_type: str) -> None:
    x = tokens()
    ours = adapted(base, method)
    save_adapter(ours, folder)
    files = read_files(folder)
    assert files.config["peft_type"] == peft_type
    assert [key for key in files.tensors if "classifier" not in key and "score" not in key] == ["prompt_embeddings"]
    close(logits(read_by_peft(base, folder), x), logits(ours, x))
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-2)
    again = copy.deepcopy(base)
    load_adapter(again, folder)
    close(logits(again, x), logits(ours, x))


def theirs_here_and_back(base: nn.Module, config: peft.PeftConfig, folder: Path) -> None:
    x = tokens()
    made_by_peft(base, config, folder)
    theirs = read_by_peft(base, folder)  # not the model that made it, in which P-tuning still has its encoder
    here = copy.deepcopy(base)
    load_adapter(here, folder)
    close(logits(here, x), logits(theirs, x))
    assert not torch.allclose(logits(here, x), logits(base, x), atol=1e-2)
    save_adapter(here, folder / "again")
    close(logits(read_by_peft(base, folder / "again"), x), logits(theirs, x))


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "gpt2_classifier"])
@pytest.mark.parametrize("length", [1, 5])
def test_prompts(model, length, tmp_path):
    base = build(model)
    ours_there_and_back(base, lp.PromptTuning(length), tmp_path / "ours", "PROMPT_TUNING")
    config = peft.PromptTuningConfig(task_type=TASKS[model], num_virtual_tokens=length)
    theirs_here_and_back(base, config, tmp_path / "theirs")


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_is_written_without_its_encoder(model, encoder, tmp_path):
    base = build(model)
    dropout = 0.0 if encoder == "mlp" else 0.4
    method = lp.PTuning(3, encoder=encoder, hidden_size=6, dropout=dropout)
    ours_there_and_back(base, method, tmp_path / "ours", "P_TUNING")
    config = peft.PromptEncoderConfig(
        task_type=TASKS[model],
        num_virtual_tokens=3,
        encoder_hidden_size=6,
        encoder_reparameterization_type=encoder.upper(),
    )
    theirs_here_and_back(base, config, tmp_path / "theirs")


def accept_old_cache_name(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add ``past_key_values`` to the signature: PEFT 0.21.2 looks for it, but transformers 5.24 renamed it."""
    signature = inspect.signature(type(base).forward)
    if "past_key_values" in signature.parameters:
        return
    *named, rest = signature.parameters.values()
    new = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = signature.replace(parameters=[*named, new, rest])
    monkeypatch.setattr(type(base).forward, "__signature__", signature, raising=False)


@pytest.mark.parametrize("model", ["llama", "gpt2", "multi_query", "gpt2_classifier"])
@pytest.mark.parametrize("bottleneck", [None, 5])
def test_prefixes_are_written_without_their_projection(model, bottleneck, tmp_path, monkeypatch):
    base = build(model)
    if model == "gpt2_classifier":
        accept_old_cache_name(base, monkeypatch)
    method = lp.PrefixTuning(4, bottleneck_size=bottleneck, shift_positions=True, init_std=0.5)
    ours_there_and_back(base, method, tmp_path / "ours", "PREFIX_TUNING")
    config = peft.PrefixTuningConfig(
        task_type=TASKS[model],
        num_virtual_tokens=4,
        prefix_projection=bottleneck is not None,
        encoder_hidden_size=bottleneck,
    )
    theirs_here_and_back(base, config, tmp_path / "theirs")


def test_writing_leaves_the_model_in_its_mode(tmp_path):
    model = adapted(build("llama"), lp.PTuning(3, encoder="lstm", dropout=0.5)).train()
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert all(m.training for m in model.modules())
    a, b = (read_files(tmp_path / n).tensors["prompt_embeddings"] for n in "ab")
    assert torch.equal(a, b), "dropout was on"


@pytest.mark.parametrize("method", [lp.PromptTuning(3), lp.PrefixTuning(3, shift_positions=True, init_std=0.5)])
def test_from_a_wrapped_model_to_a_bare_one(method, tmp_path):
    base, x = build("llama"), tokens()
    model = adapted(Wrapped(copy.deepcopy(base)), method)
    save_adapter(model, tmp_path)
    here = copy.deepcopy(base)
    load_adapter(here, tmp_path)
    close(logits(here, x), logits(model.net, x))
    back = Wrapped(copy.deepcopy(base))
    load_adapter(back, tmp_path)
    close(logits(back.net, x), logits(model.net, x))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (lp.PromptTuning(3, position="suffix"), "no counterpart of position='suffix'"),
        (lp.PromptTuning(template="v1 x1 v2 x*"), "no counterpart of template="),
        (lp.PTuning(3, position="after_bos"), "no counterpart of position='after_bos'"),
        (lp.PrefixTuning(3), "counts positions from the end of the prefix"),
        (lp.PrefixTuning(3, shift_positions=True, gate=True), "have no gate"),
        (lp.PrefixTuning(3, shift_positions=True, layers=[0]), "every attention layer of a decoder"),
        (lp.PrefixTuning(3, bottleneck_size=4), "counts positions"),
    ],
)
def test_adapters_that_peft_cannot_represent_are_written_natively(method, reason, tmp_path):
    base, x = build("llama"), tokens()
    ours = adapted(base, method)
    save_adapter(ours, tmp_path)
    config = read_files(tmp_path).config
    assert config["peft_type"] == "LIGHTNING_PEFT"
    assert reason in config["reason"]
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, x), logits(ours, x))


@pytest.mark.parametrize(
    ("change", "tensor", "reason"),
    [
        ({"num_virtual_tokens": 4}, None, "has 3 entries, but the options declare 4 x 1 virtual tokens"),
        ({"num_virtual_tokens": "3"}, None, "must be an integer"),
        ({"num_virtual_tokens": None}, None, "num_virtual_tokens"),
        ({}, torch.zeros(3, 7), "has shape 3x7, but this base needs"),
        ({"prompt_scale": 2}, None, "unknown option prompt_scale=2"),
    ],
)
def test_files_that_cannot_be_read(change, tensor, reason, tmp_path):
    base = build("llama")
    save_adapter(adapted(base, lp.PromptTuning(3)), tmp_path)
    files = read_files(tmp_path)
    tensors = files.tensors if tensor is None else {"prompt_embeddings": tensor}
    write_files(tmp_path, {**files.config, **change}, tensors, {}, None)
    with pytest.raises((FormatError, ValueError), match=reason):
        load_adapter(base, tmp_path)
    assert not any("adapters" in key for key in base.state_dict())


def test_prefixes_of_another_base(tmp_path):
    save_adapter(adapted(build("llama"), lp.PrefixTuning(3, shift_positions=True)), tmp_path)
    with pytest.raises(FormatError, match="has shape 3x64, but this base needs 3x48"):
        load_adapter(build("multi_query"), tmp_path, check_base=False)


def test_a_prompt_of_a_model_without_attention_is_saved_natively(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    base = MambaForCausalLM(MambaConfig(**sizes))
    lp.apply(model := copy.deepcopy(base), lp.PromptTuning(2))
    lp.save_adapter(model, tmp_path)
    assert "num_attention_heads" in read_files(tmp_path).config["reason"]
    lp.load_adapter(base, tmp_path)
