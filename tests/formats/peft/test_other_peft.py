"""The exchange with another release of PEFT, in a separate process.

pip install --no-deps --target /somewhere peft==0.18.1
LIGHTNING_PEFT_OTHER_PEFT=/somewhere pytest tests/formats/peft/test_other_peft.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from tests.formats.models import adapted, logits
from tests.formats.other_peft import MADE, base, tokens

WHERE = os.environ.get("LIGHTNING_PEFT_OTHER_PEFT")

OURS = {
    "llama-lora": lp.LoRA(r=3, alpha=4, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "llama-dora": lp.DoRA(r=2, targets=["o_proj"], use_rslora=True),
    "llama-pissa": lp.LoRA(r=2, targets=["o_proj"], init="pissa"),
    "llama-adalora": lp.AdaLoRA(target_r=2, init_r=3, targets=["q_proj"]),
    "gpt2-tokens": lp.LoRA(r=2, targets=["c_attn"], trainable_tokens=[3, 9]),
    "bert-head": lp.LoRA(r=2, targets=["query"], trainable=["classifier"], bias="all"),
    "Convolutions-all": lp.LoRA(r=2, targets=["conv1", "conv2", "conv3", "emb"]),
    "Attention-all": lp.LoRA(r=2, targets=["attn", "fc"]),
}


@pytest.mark.skipif(not WHERE, reason="LIGHTNING_PEFT_OTHER_PEFT names no folder with another release of PEFT")
def test_the_exchange_with_another_release_of_peft(tmp_path):
    models, x = {}, tokens()
    for name, method in OURS.items():
        models[name] = adapted(base(name.partition("-")[0]), method)
        lp.save_adapter(models[name], tmp_path / "ours" / name)
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(WHERE), str(root)])
    command = [sys.executable, "-m", "tests.formats.other_peft", str(tmp_path)]
    run = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    for name, model in models.items():
        theirs = torch.load(tmp_path / "ours" / name / "logits.pt", weights_only=True)
        torch.testing.assert_close(theirs, logits(model, x), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in MADE:
        here = base(name)
        lp.load_adapter(here, tmp_path / "theirs" / name)
        theirs = torch.load(tmp_path / "theirs" / name / "logits.pt", weights_only=True)
        torch.testing.assert_close(logits(here, x), theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
