"""Exchange AdaLoRA's adapter directories with PEFT, with triplets that either library pruned."""

import copy
import json

import peft
import pytest
import torch

import lightning_peft as lp
from tests.formats.models import Convolutions, adapted, gpt2, llama, logits, moved, read_by_peft, tokens

#: a mask for a large rank of which three triplets are left, as many as the file holds
MANY = [True] * 3 + [False] * 4093


def pruned(model, method):
    """Mask some triplets, and all triplets of the first weight."""
    with torch.no_grad():
        for i, adapter in enumerate(method.adapters(model).values()):
            adapter.mask.copy_(torch.rand_like(adapter.lora_E) < 0.5 if i else torch.zeros_like(adapter.mask))
            adapter.lora_E.mul_(adapter.mask)
    return model


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("make", "targets"), [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn"])])
def test_peft_reads_ours_and_back(make, targets, some, tmp_path):
    base, x = make(), tokens()
    method = lp.AdaLoRA(target_r=2, init_r=5, alpha=40, targets=targets)
    ours = adapted(base, method)
    if some:
        pruned(ours, method)
    lp.save_adapter(ours, tmp_path)
    theirs = read_by_peft(base, tmp_path)
    torch.testing.assert_close(logits(theirs, x), logits(ours, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)
    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x), rtol=1e-4, atol=1e-5)
    assert lp.adapter_state(again).keys() == lp.adapter_state(ours).keys()


def test_loading_an_adapter_that_peft_pruned(tmp_path):
    base, x = llama(), tokens()
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_r=2, init_r=4, tfinal=1, total_step=3, target_modules=["q_proj", "o_proj"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    moved(theirs)
    for step in range(1, 3):
        theirs(input_ids=x, labels=x).loss.backward()
        theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(tmp_path)
    ranks = [sum(v) for v in json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values()]
    assert min(ranks) < 4
    want = logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), x)
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_r": 10**12}, "lora_A' has shape 3x32, but this base needs 1000000000000x32"),
        ({"init_r": 2.5}, "init_r must be an integer of at least 1, got 2.5"),
        ({"rank_pattern": {"layers.0": 3}}, "must map names to lists of true and false"),
        (
            {"init_r": 4096, "rank_pattern": {f"model.layers.{i}.self_attn.q_proj.lora_E": MANY for i in range(2)}},
            "init_r=4096 is more than the rank that 'model.layers.0.self_attn.q_proj' of shape 32x32",
        ),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "has 1 entries, but init_r is 3"),
    ],
)
def test_ranks_that_do_not_fit_the_file(options, said, tmp_path):
    base = llama()
    lp.save_adapter(adapted(base, lp.AdaLoRA(target_r=2, init_r=3, targets=["q_proj"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(lp.FormatError, match=said):
        lp.load_adapter(base, tmp_path)


def test_a_convolution(tmp_path):
    base, x = Convolutions().eval(), tokens()
    ours = adapted(base, lp.AdaLoRA(target_r=2, init_r=3, targets=["conv2", "inner.head"]))
    lp.save_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path), x), logits(ours, x), rtol=1e-4, atol=1e-5)
