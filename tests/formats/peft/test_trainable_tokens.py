"""Embedding entries that train with LoRA, and their exchange with PEFT."""

import copy

import peft
import pytest
import torch

import lightning_peft as lp
from tests.formats.models import Attention, adapted, gpt2, llama, logits, made_by_peft, read_by_peft, tokens
from tests.models import TiedLM


def tied_llama():
    return llama(tie_word_embeddings=True)


def tied_own():
    return TiedLM().eval()


@pytest.mark.parametrize("make", [llama, tied_llama, gpt2])
@pytest.mark.parametrize("how", [list, dict])
def test_rows_go_to_peft_and_back(make, how, tmp_path):
    base, x = make(), tokens()
    name = "wte" if make is gpt2 else "embed_tokens"
    target = "c_attn" if make is gpt2 else "q_proj"
    ids = [int(x[0, 0]), 63, 5] if int(x[0, 0]) not in (5, 63) else [63, 5, 1]
    ours = adapted(base, lp.LoRA(r=2, targets=[target], trainable_tokens=ids if how is list else {name: ids}))
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)
    lp.save_adapter(ours, tmp_path / "ours")
    theirs = read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, x), logits(ours, x), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = copy.deepcopy(base)
        lp.load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(logits(again, x), logits(ours, x), rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_whose_three_embeddings_are_one_tensor(tmp_path):
    from lightning_peft.formats.directory.files import read_files, write_files
    from tests.formats.peft.families.test_sequence import logits, t5

    base, x = t5(), tokens()
    ours = adapted(base, lp.LoRA(r=2, targets=["q"], trainable_tokens=[int(x[0, 0])]))
    lp.save_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path), x), logits(ours, x), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, x), logits(ours, x), rtol=1e-4, atol=1e-5)

    files = read_files(tmp_path)
    key = "base_model.model.shared.token_adapter.trainable_tokens_delta"
    files.tensors[key] = files.tensors[key] + 1
    write_files(tmp_path, files.config, files.tensors, files.metadata, None)
    with pytest.raises(lp.FormatError, match="has other values than the file has for an embedding that is tied to it"):
        lp.load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("ids", [[9, 3, 60], {"embed_tokens": [9, 3, 60]}])
@pytest.mark.parametrize("make", [llama, tied_llama])
def test_embedding_entries_of_peft_keep_their_order(make, ids, tmp_path):
    base, x = make(), tokens()
    x[0, :3] = torch.tensor([9, 3, 60])
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=ids)
    theirs = made_by_peft(base, config, tmp_path)
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=1e-4, atol=1e-5)


def test_only_the_rows_train_and_a_tied_head_shares_them():
    base, x = tied_llama(), tokens()
    model = copy.deepcopy(base)
    lp.apply(model, lp.LoRA(r=2, targets=["q_proj"], trainable_tokens=[1, int(x[0, 0])]))
    embedding, head = model.model.embed_tokens.adapters["default"], model.lm_head.adapters["default"]
    assert embedding.rows is head.rows
    torch.testing.assert_close(logits(model, x), logits(base, x), rtol=0, atol=1e-6)
    model(x).logits.square().mean().backward()
    assert embedding.rows.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("make", [llama, tied_llama, tied_own])
def test_rows_of_embedding_and_head_go_to_peft_and_back(make, tmp_path):
    base, x = make(), tokens() % 11
    name, target = ("embed", "fc1") if make is tied_own else ("embed_tokens", "q_proj")
    wanted = {name: [9, 3], "lm_head": [9, 3]}
    ours = adapted(base, lp.LoRA(r=2, targets=[target], trainable_tokens=wanted))
    rows = {tuple(k.split(".adapters.")): p for k, p in ours.named_parameters() if k.endswith("rows")}
    assert len(rows) == (2 if make is llama else 1)
    assert not torch.equal(logits(ours, x)[..., [9, 3]], logits(base, x)[..., [9, 3]])
    lp.save_adapter(ours, tmp_path / "ours")
    theirs = read_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, x), logits(ours, x), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = copy.deepcopy(base)
        lp.load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(logits(again, x), logits(ours, x), rtol=1e-4, atol=1e-5)


def test_rows_merge():
    base, x = llama(), tokens()
    model = adapted(base, lp.LoRA(r=2, targets=["q_proj"], trainable_tokens=[int(x[0, 0])]))
    want = logits(model, x)
    lp.merge(model)
    torch.testing.assert_close(logits(model, x), want, rtol=1e-4, atol=1e-5)
    lp.unmerge(model)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("tokens_", "said"),
    [
        ([1, 1], "different token ids"),
        ([-1], "integers of at least 0"),
        ("12", "list"),
        ([64], "has 64 entries, so token 64 does not exist"),
        ({"embed": [1]}, "nearest: .*embed_tokens"),
    ],
)
def test_invalid_tokens_are_refused(tokens_, said):
    with pytest.raises(ValueError, match=said):
        lp.apply(llama(), lp.LoRA(targets=["q_proj"], trainable_tokens=tokens_))


def test_an_embedding_that_is_adapted_as_well_is_an_error():
    with pytest.raises(ValueError, match="adapted or trained in full"):
        lp.apply(Attention(), lp.LoRA(r=2, targets=["emb"], trainable_tokens=[1]))
