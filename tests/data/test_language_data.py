"""LanguageModelData: causal labels, blocks, and masking."""

import pytest
import torch

from lightning_peft.data import LanguageModelData


def module(**arguments):
    data = LanguageModelData(**{"tokenizer": "demo", "batch_size": 16, **arguments})
    data.setup()
    return data


def test_causal_labels_are_the_tokens_and_padding_is_not_predicted():
    batch = next(iter(module().val_dataloader()))
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][real], batch["input_ids"][real])
    assert (batch["labels"][~real] == -100).all()
    assert (~real).any()


def test_masking_hides_the_fraction_asked_for_and_no_special_token():
    torch.manual_seed(0)
    data = module(mask=0.3, batch_size=256)
    plain = next(iter(module(batch_size=256).val_dataloader()))["input_ids"]
    batch = next(iter(data.val_dataloader()))
    hidden = batch["labels"] != -100
    special = torch.isin(plain, torch.tensor(data.tokenizer.all_special_ids))
    assert not (hidden & special).any()
    assert hidden.sum() / (~special).sum() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(batch["labels"][hidden], plain[hidden])
    assert torch.equal(batch["input_ids"][~hidden], plain[~hidden])
    masked = batch["input_ids"][hidden] == data.tokenizer.mask_token_id
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02)


def test_held_out_texts_are_masked_the_same_each_time_and_training_texts_anew():
    data = module(mask=0.3)
    first, second = (next(iter(data.val_dataloader()))["labels"] for _ in range(2))
    assert torch.equal(first, second)
    example = data.val_dataloader().dataset[0]
    hidden = [data.collate([example], "train")["labels"] for _ in range(2)]
    assert not torch.equal(*hidden)


def test_blocks_have_one_length_and_lose_only_the_end(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"line number {i} of this file" for i in range(40)) + "\n")
    lines = module(source=str(path)).train_dataloader().dataset
    stream = [token for example in lines for token in example["input_ids"]]
    blocks = module(source=str(path), block_size=16).train_dataloader().dataset
    assert {len(block["input_ids"]) for block in blocks} == {16}
    joined = [token for block in blocks for token in block["input_ids"]]
    assert joined == stream[: len(joined)]
    assert len(stream) - len(joined) < 16


@pytest.mark.parametrize(("argument", "value"), [("mask", 0.0), ("mask", 1.5), ("block_size", 1)])
def test_bad_numbers_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        LanguageModelData(**{argument: value})


def test_masking_needs_a_mask_token():
    data = module()
    data.tokenizer.mask_token = None
    data.mask = 0.15
    with pytest.raises(ValueError, match="no mask token: pass mask=None"):
        data.setup()
