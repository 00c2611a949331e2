"""TextClassificationData: sources, labels, order, padding, and its errors."""

import lightning as L
import pytest
import torch

from lightning_peft import demo
from lightning_peft.data import TextClassificationData
from lightning_peft.data.sources import load_table


def module(**arguments):
    data = TextClassificationData(**{"tokenizer": "demo", "batch_size": 4, **arguments})
    data.setup()
    return data


@pytest.fixture
def reviews(tmp_path):
    train, valid = tmp_path / "train.csv", tmp_path / "valid.csv"
    train.write_text("review,stars\nvery good,5\nvery bad,1\nso so,3\n")
    valid.write_text("review,stars\nquite good,5\n")
    return {"source": str(train), "validation": str(valid), "text": "review", "label": "stars"}


def test_demo_labels_are_in_the_models_order():
    data = module()
    assert data.labels == list(demo.labels())
    batch = next(iter(data.val_dataloader()))
    rows = demo.load("validation")[:4]
    assert [data.labels[number] for number in batch["labels"]] == [row["label"] for row in rows]


def test_batches_are_padded_to_their_longest_text_and_cut_at_max_length():
    for batch, _ in zip(module(max_length=40).train_dataloader(), range(5)):
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max() <= 40
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_order_follows_the_global_seed():
    def first(seed):
        L.seed_everything(seed)
        return next(iter(module().train_dataloader()))["input_ids"]

    assert torch.equal(first(1), first(1))
    assert first(1).tolist() != first(2).tolist()


def test_csv_files_with_numeric_labels(reviews):
    data = module(**reviews)
    assert data.labels == [1, 3, 5]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [2]
    assert data.test_dataloader() == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.tsv"])
def test_other_formats_give_the_same_rows(name, tmp_path):
    import datasets

    rows = [{"text": "one, two", "label": "a"}, {"text": "three", "label": "b"}]
    table, path = datasets.Dataset.from_list(rows), tmp_path / name
    if name.endswith("tsv"):
        table.to_csv(path, sep="\t")
    else:
        getattr(table, {"jsonl": "to_json", "parquet": "to_parquet"}[name.split(".")[1]])(path)
    assert load_table(str(path), "train").select_columns(["text", "label"]).to_list() == rows


def test_missing_column_names_the_nearest(reviews):
    with pytest.raises(ValueError, match=r"no column 'star' \(did you mean 'stars'\?\); it has review, stars"):
        module(**{**reviews, "label": "star"})
    with pytest.raises(ValueError, match="the demo corpus's 'train' split has no column 'txt'"):
        next(iter(module(text="txt").train_dataloader()))


def test_missing_file_names_the_nearest(reviews):
    with pytest.raises(FileNotFoundError, match=r"trian.csv' \(did you mean 'train.csv'\?\)"):
        module(**{**reviews, "source": reviews["source"].replace("train", "trian")})


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in one of"):
        module(source=str(tmp_path / "rows.xls"))


def test_label_that_train_lacks_is_named(reviews, tmp_path):
    (tmp_path / "valid.csv").write_text("review,stars\nfine,4\n")
    with pytest.raises(ValueError, match="validation split contains label 4, which never occurs in training"):
        next(iter(module(**reviews).val_dataloader()))


def test_tokenizer_is_asked_for_when_the_module_names_no_model(reviews):
    with pytest.raises(ValueError, match="pass tokenizer="):
        TextClassificationData(**reviews).setup()


@pytest.mark.parametrize("argument", ["batch_size", "max_length"])
def test_sizes_are_positive(argument):
    with pytest.raises(ValueError, match=f"{argument}=0"):
        TextClassificationData(**{argument: 0})
