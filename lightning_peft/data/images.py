"""Data for image classification, from folders of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.data.base import Example
from lightning_peft.data.files import ClassFolderData
from lightning_peft.data.vision import IMAGENET_MEAN, IMAGENET_STD, ImageBatch
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


class ImageFolderData(ClassFolderData):
    """Images in one folder per class (``train/cat/1.jpg``), decoded as they are needed.

    Every file is opened before training, so that one that is not an image is refused. Batches are
    ``{"images", "labels"}``; the images are normalised float32, ``(batch, 3, size, size)``. In ``predict``, the folder
    may hold images directly, and ``labels`` are absent.

    Args:
        source: A folder with a subfolder of images for each class.
        validation: The folder of the validation split, or ``None``.
        test: The folder of the test split, or ``None``.
        size: Images are resized to this many pixels in height and width.
        mean: The mean to subtract from each channel, for values in [0, 1]; ImageNet's by default.
        std: The standard deviation to divide each channel by.
        flip: Mirror each training image left to right with probability 0.5.
        crop: Shift each training image by up to this many pixels in each direction, padded with zeros; 0 disables it.
        **options: ``predict`` (a folder), ``validation_fraction``, ``batch_size`` and ``num_workers``, as for
            :class:`TableDataModule`.

    Example::

        ImageFolderData("photos", validation_fraction=0.2, size=224)
    """

    suffixes = _SUFFIXES
    kind = "image"

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        flip: bool = True,
        crop: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(source, validation=validation, test=test, **options)
        if size < 1 or crop < 0:
            raise InputError(f"size={size} must be at least 1 and crop={crop} at least 0 pixels.")
        self.size, self.mean, self.std, self.flip, self.crop = size, tuple(mean), tuple(std), flip, crop

    def check_file(self, path: Path) -> None:
        """Open the file and verify its structure."""
        from PIL import Image

        with Image.open(path) as image:
            image.verify()

    def collate(self, examples: list[Example], split: str) -> dict[str, Any]:
        """``images``, ``(batch, 3, size, size)``, and ``labels``, ``(batch,)``, except in ``predict``."""
        import numpy as np

        train = split == "train"
        batch = ImageBatch(self.mean, self.std, self.flip and train, self.crop if train else 0, [])
        pixels = [torch.from_numpy(np.asarray(self._decoded(Path(e["file"]))).copy()) for e in examples]
        found = batch([(image, torch.tensor(e.get("label", 0))) for image, e in zip(pixels, examples)])
        return {name: value for name, value in found.items() if name != "labels" or split != "predict"}

    def _decoded(self, path: Path) -> Image:
        from PIL import Image

        try:
            with Image.open(path) as image:
                return image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        except OSError as error:
            raise InputError(f"{str(path)!r} is a damaged image: {error}. Replace or remove it.") from error
