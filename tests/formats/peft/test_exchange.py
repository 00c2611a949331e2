"""Random configurations of LoRA are exchanged with PEFT both ways, and the logits agree."""

import copy
import random

import peft
import pytest
import torch

import lightning_peft as lp
from tests.formats import models
from tests.formats.models import adapted, logits, made_by_peft, read_by_peft, tokens

#: model -> the weights that LoRA may adapt in it, and PEFT's names for them
LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "wpe"],
    "bert": ["query", "key", "value", "intermediate.dense", "word_embeddings", "pooler.dense"],
    "Convolutions": ["emb", "conv1", "conv2", "grouped", "conv3", "head", "inner.head"],
    "Attention": ["emb", "attn", "fc"],
    "Experts": ["layers.0.up", "layers.1.up", "layers.0.down", "layers.1.down", "layers.0.gate", "layers.1.gate", "fc"],
}
BARE = ("up", "down", "gate")


def draw(seed):
    """A model's name and the arguments of our LoRA."""
    rng = random.Random(seed)
    model = list(LAYERS)[seed % len(LAYERS)]
    targets = sorted(rng.sample(LAYERS[model], rng.randint(1, min(4, len(LAYERS[model])))))
    some = rng.sample(targets, rng.randint(0, len(targets)))
    options = {
        "targets": targets,
        "r": rng.choice([2, 4]),
        "alpha": rng.choice([1, 5, 16]),
        "use_rslora": rng.random() < 0.4,
        "rank_pattern": {target: rng.choice([2, 6]) for target in some},
        "alpha_pattern": {target: rng.choice([3, 8.5]) for target in some},
    }
    return model, options


@pytest.mark.parametrize("seed", range(36))
def test_ours_in_peft_and_back(seed, tmp_path):
    model, options = draw(seed)
    rng = random.Random(seed)
    plain = model in ("llama", "gpt2", "bert")
    method = lp.DoRA if plain and rng.random() < 0.3 else lp.LoRA
    if plain:
        options["bias"] = rng.choice(["none", "lora_only", "all"]) if model != "llama" else "none"
        options["init"] = rng.choice(["kaiming", "orthogonal", "pissa", "olora"]) if method is lp.LoRA else "kaiming"
        if options["init"] == "pissa" or options["init"] == "olora":
            options["targets"] = [t for t in options["targets"] if "emb" not in t and t != "wpe"] or ["all-linear"]
            patterns = ("rank_pattern", "alpha_pattern")
            options |= {p: {t: v for t, v in options[p].items() if t in options["targets"]} for p in patterns}
    if model in ("bert", "llama"):
        head = {"bert": "classifier", "llama": "norm"}[model]  # in llama, this is also the end of other names
        options["trainable"] = rng.choice([(), (f"re:(model.)?{head}",)])
    base, x = getattr(models, model)().eval(), tokens()
    ours = adapted(base, method(**options))
    lp.save_adapter(ours, tmp_path / "ours", fold_scale=rng.random() < 0.3)
    theirs = read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, x), logits(ours, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)

    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(logits(again, x), logits(ours, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(36))
def test_peft_file_loads_here_and_goes_back(seed, tmp_path):
    model, ours = draw(seed)
    rng = random.Random(seed)
    bare = [t for t in ours["targets"] if t.rpartition(".")[2] in BARE]
    config = peft.LoraConfig(
        r=ours["r"],
        lora_alpha=ours["alpha"],
        use_rslora=ours["use_rslora"],
        rank_pattern=ours["rank_pattern"],
        alpha_pattern=ours["alpha_pattern"],
        target_modules=[t for t in ours["targets"] if t not in bare],
        target_parameters=bare or None,
        use_dora=model in ("llama", "gpt2", "bert") and rng.random() < 0.3,
        bias=rng.choice(["none", "lora_only", "all"]) if model in ("gpt2", "bert") else "none",
    )
    base, x = getattr(models, model)().eval(), tokens()
    theirs = made_by_peft(base, config, tmp_path / "theirs")
    here = copy.deepcopy(base)
    if "grouped" in ours["targets"]:
        with pytest.raises(lp.FormatError, match="mixes channels of different groups"):
            lp.load_adapter(here, tmp_path / "theirs")
        return
    lp.load_adapter(here, tmp_path / "theirs")
    torch.testing.assert_close(logits(here, x), logits(theirs, x), rtol=1e-4, atol=1e-5)

    lp.save_adapter(here, tmp_path / "again")
    again = read_by_peft(base, tmp_path / "again")
    torch.testing.assert_close(logits(again, x), logits(theirs, x), rtol=1e-4, atol=1e-5)
