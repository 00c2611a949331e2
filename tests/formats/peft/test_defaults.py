"""In files that omit options with default values, a missing option means the same as in PEFT."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch

import lightning_peft as lp
from lightning_peft.formats.directory.files import read_files, write_files
from tests.formats.models import llama, logits, made_by_peft, read_by_peft, tokens

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "LORA": peft.LoraConfig(**TARGETS),
    "ADALORA": peft.AdaLoraConfig(total_step=9, **TARGETS),
    "LOHA": peft.LoHaConfig(**TARGETS),
    "LOKR": peft.LoKrConfig(**TARGETS),
    "OFT": peft.OFTConfig(**TARGETS),
    "VERA": peft.VeraConfig(save_projection=True, **TARGETS),
    "IA3": peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
#: without this option, PEFT computed OFT differently
NEEDED = {"oft_block_size"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_option_has_pefts_default(kind, tmp_path):
    base, x = llama(), tokens()
    made_by_peft(base, CONFIGS[kind], tmp_path)
    files = read_files(tmp_path)
    defaults = {field.name: field.default for field in dataclasses.fields(type(CONFIGS[kind]))}
    short = {
        option: value
        for option, value in files.config.items()
        if option in NEEDED or option not in defaults or value != getattr(defaults[option], "value", defaults[option])
    }
    assert len(short) < len(files.config)
    write_files(tmp_path, short, files.tensors, {}, None)
    lp.load_adapter(here := copy.deepcopy(base), tmp_path)
    expected = logits(read_by_peft(base, tmp_path), x)
    torch.testing.assert_close(logits(here, x)[:, -7:], expected[:, -7:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[:, -7:], logits(base, x), atol=1e-3)
