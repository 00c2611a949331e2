"""ImageData: what a batch holds, augmentation, and files that do not fit."""

import numpy as np
import pytest
import torch

from lightning_peft.data import ImageData
from lightning_peft.pretrained import InputError


def write(path, count=6, classes=("cat", "dog"), **arrays):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 10, 3), dtype=np.uint8)
    named = {} if classes is None else {"classes": np.array(classes)}
    np.savez(path, **{"images": images, "labels": np.arange(count) % 2, **named, **arrays})
    return str(path)


def test_batches_are_normalised_and_channels_first(tmp_path):
    path = write(tmp_path / "a.npz")
    data = ImageData(path, path, path, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), batch_size=4)
    data.setup()
    assert data.classes == ["cat", "dog"]
    batch = next(iter(data.val_dataloader()))
    image = torch.from_numpy(np.load(path)["images"][1]).permute(2, 0, 1) / 255
    expected = (image - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(batch["images"][1], expected)
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert len(data.test_dataloader()) == len(data.predict_dataloader()) == 2


def test_only_training_images_are_augmented_and_the_seed_fixes_how(tmp_path):
    path = write(tmp_path / "a.npz", count=64)
    data = ImageData(path, path, crop=2)
    data.setup()
    plain = next(iter(data.val_dataloader()))["images"]
    assert torch.equal(plain, next(iter(data.val_dataloader()))["images"])

    def train():
        torch.manual_seed(3)
        return next(iter(data.train_dataloader()))["images"]

    assert torch.equal(train(), train())
    assert train().shape == plain.shape
    flips = ImageData(path, path)
    flips.setup()
    torch.manual_seed(0)
    batch = next(iter(flips.train_dataloader()))
    whole = {row.numpy().tobytes() for row in plain}
    same = [image.numpy().tobytes() in whole for image in batch["images"]]
    mirrored = [image.flip(-1).contiguous().numpy().tobytes() in whole for image in batch["images"]]
    assert all(a or b for a, b in zip(same, mirrored))
    assert 16 < sum(same) < 48
    assert next(iter(ImageData(path, flip=False).train_dataloader()))["images"].is_contiguous()


def test_classes_come_from_the_labels_where_none_are_named(tmp_path):
    data = ImageData(write(tmp_path / "a.npz", classes=None))
    data.setup()
    assert data.classes == [0, 1]
    assert data.val_dataloader() == []


def test_files_that_do_not_fit_are_named(tmp_path):
    path = write(tmp_path / "train.npz")
    with pytest.raises(FileNotFoundError, match=r"train: there is no file .*trian.npz' \(did you mean 'train.npz'\?\)"):
        ImageData(str(tmp_path / "trian.npz")).setup()
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(InputError, match=r"text.npz cannot be read as .npz: save the arrays with numpy.savez"):
        ImageData(str(tmp_path / "text.npz")).setup()
    np.save(tmp_path / "one.npy", np.zeros(2))
    with pytest.raises(InputError, match=r"one.npy holds one array without a name"):
        ImageData(str(tmp_path / "one.npy")).setup()
    with pytest.raises(ValueError, match=r"train.npz has no array 'x'; it has images, labels, classes"):
        ImageData(path, images="x").setup()
    with pytest.raises(ValueError, match=r"uint8 \(6, 8, 10, 3\); expected uint8 \(N, height, width, 1\)"):
        ImageData(path, mean=(0.5,), std=(0.5,)).setup()
    with pytest.raises(ValueError, match=r"'labels' is float64 \(6,\); expected integers \(6,\)"):
        ImageData(write(tmp_path / "b.npz", labels=np.zeros(6))).setup()
    with pytest.raises(ValueError, match="crop=-1"):
        ImageData(path, crop=-1)


def test_a_label_outside_the_classes_is_refused_before_training(tmp_path):
    good = write(tmp_path / "good.npz")
    bad = write(tmp_path / "bad.npz", labels=np.array([0, 1, 0, 2, 0, 1]))
    with pytest.raises(
        ValueError, match=r"bad.npz: image 3 has the label 2, outside the range 0 to 1: number the 2 cl"
    ):
        ImageData(good, test=bad).setup()
    with pytest.raises(ValueError, match=r"from1.npz: image 1 has the label 2, outside the range 0 to 1"):
        ImageData(write(tmp_path / "from1.npz", classes=None, labels=np.array([1, 2] * 3))).setup()
