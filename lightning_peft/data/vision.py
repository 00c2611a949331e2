"""Data for image classification, from ``.npz`` files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.core.names import nearest
from lightning_peft.pretrained import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageData(L.LightningDataModule):
    """Images of one size with one label each, kept in memory.

    A file holds an array of uint8 images, ``(N, height, width, channels)``, and an array of integer labels, ``(N,)``.
    An optional array ``classes`` names the classes. Batches are ``{"images", "labels"}``; the images are normalised
    float32, ``(batch, channels, height, width)``.

    Args:
        train: The path of an ``.npz`` file.
        validation: The file of the validation split, or ``None``.
        test: The file of the test split, which ``predict`` also uses, or ``None``.
        images: The name of the array of images.
        labels: The name of the array of labels.
        mean: The mean to subtract from each channel, for values in [0, 1]; ImageNet's by default.
        std: The standard deviation to divide each channel by.
        flip: Mirror each training image left to right with probability 0.5.
        crop: Shift each training image by up to this many pixels in each direction, padded with zeros; 0 disables it.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader.
        adapters: The name of an array of strings ``(N,)`` with each image's adapter; an empty string selects the base
            alone. Batches then contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.

    Raises:
        FileNotFoundError: if a file does not exist.
        InputError: if an array is missing, or its shape or dtype is not as described above, or
            a label is not one of the training file's classes.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        images: str = "images",
        labels: str = "labels",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        flip: bool = True,
        crop: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        adapters: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: it must be at least 1.")
        if crop < 0:
            raise InputError(f"crop={crop}: it is a number of pixels and must be at least 0.")
        self.files = {"train": train, "validation": validation, "test": test}
        self.images, self.labels, self.adapters = images, labels, adapters
        self.mean, self.std = tuple(mean), tuple(std)
        self.flip, self.crop = flip, crop
        self.batch_size, self.num_workers = batch_size, num_workers
        self.classes: list[Any] = []
        self._data: dict[str, TensorDataset] = {}
        self._names: list[str | None] = []  # adapter names of all splits; a sample stores an index into this list
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Read the class names and every file, so that a bad one is refused before training."""
        for split, path in self.files.items():
            if path is not None:
                self._read(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented batches of the training file."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the validation file; an empty list if there is none."""
        return self._loader("validation") if self.files["validation"] is not None else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the test file; an empty list if there is none."""
        return self._loader("test") if self.files["test"] is not None else []

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The test file's batches."""
        return self.test_dataloader()

    def _loader(self, split: str) -> DataLoader[Any]:
        return DataLoader(
            self._read(split),
            batch_size=self.batch_size,
            shuffle=split == "train",
            collate_fn=ImageBatch(
                self.mean, self.std, *((self.flip, self.crop) if split == "train" else (False, 0)), self._names
            ),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _read(self, split: str) -> TensorDataset:
        import numpy as np

        if split in self._data:
            return self._data[split]
        path = Path(str(self.files[split])).expanduser()
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.glob("*.npz")], n=1)
            raise FileNotFoundError(
                f"{split}: there is no file {str(path)!r}{f' (did you mean {near[0]!r}?)' if near else ''}."
            )
        with _open(path) as arrays:
            for name in filter(None, (self.images, self.labels, self.adapters)):
                if name not in arrays:
                    raise InputError(f"{path.name} has no array {name!r}; it has {', '.join(arrays)}.")
            images, labels = arrays[self.images], arrays[self.labels]
            adapters = arrays[self.adapters] if self.adapters is not None else None
            names = arrays["classes"].tolist() if "classes" in arrays else sorted(set(labels.tolist()))
        channels = len(self.mean)
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != channels or len(self.std) != channels:
            raise InputError(
                f"{path.name}: {self.images!r} is {images.dtype} {images.shape}; expected uint8 (N, height, width, "
                f"{channels}), with as many channels as mean ({channels}) and std ({len(self.std)}) have numbers."
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(
                f"{path.name}: {self.labels!r} is {labels.dtype} {labels.shape}; expected integers ({len(images)},)."
            )
        if split == "train":
            self.classes = names
        outside = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(outside):
            raise InputError(
                f"{path.name}: image {outside[0]} has the label {labels[outside[0]]}, outside the range 0 to "
                f"{len(self.classes) - 1}: number the {len(self.classes)} classes of {self.files['train']!r} from 0."
            )
        tensors = [torch.from_numpy(images), torch.from_numpy(labels.astype("int64"))]
        if adapters is not None:
            if adapters.shape != labels.shape or adapters.dtype.kind != "U":
                raise InputError(
                    f"{path.name}: {self.adapters!r} is {adapters.dtype} {adapters.shape}; expected strings "
                    f"({len(images)},)."
                )
            own = [name or None for name in adapters.tolist()]
            self._names += [name for name in dict.fromkeys(own) if name not in self._names]
            tensors.append(torch.tensor([self._names.index(name) for name in own]))
        self._data[split] = TensorDataset(*tensors)
        return self._data[split]


def _open(path: Path) -> Any:
    import numpy as np

    try:
        loaded = np.load(path)
    except (ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"{path.name} cannot be read as .npz: save the arrays with numpy.savez.") from error
    if isinstance(loaded, np.ndarray):
        raise InputError(f"{path.name} holds one array without a name: save images and labels with numpy.savez.")
    return loaded


class ImageBatch:
    """Collate: stack, augment with torch's global generator, normalise. It can be pickled for worker processes."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], flip: bool, crop: int, adapters: list[str | None]
    ) -> None:
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.flip, self.crop, self.adapters = flip, crop, adapters

    def __call__(self, rows: list[tuple[Tensor, ...]]) -> dict[str, Any]:
        images = torch.stack([row[0] for row in rows]).permute(0, 3, 1, 2).float() / 255
        images = (images - self.mean) / self.std
        if self.flip:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        if self.crop:
            images = self._shifted(images)
        batch: dict[str, Any] = {"images": images.contiguous(), "labels": torch.stack([row[1] for row in rows])}
        if self.adapters:
            batch["adapters"] = [self.adapters[int(row[2])] for row in rows]
        return batch

    def _shifted(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, [self.crop] * 4)
        corners = torch.randint(2 * self.crop + 1, (len(images), 2)).tolist()
        return torch.stack(
            [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
        )
