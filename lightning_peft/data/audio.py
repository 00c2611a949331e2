"""Data for audio classification, from folders of recordings."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.data.base import Example
from lightning_peft.data.files import ClassFolderData
from lightning_peft.pretrained import InputError

_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


class AudioFolderData(ClassFolderData):
    """Recordings in one folder per class (``train/yes/1.wav``), read as they are needed.

    Batches are ``{"input_values", "attention_mask", "labels"}``: waves of mean 0 and variance 1, ``(batch, samples)``,
    padded with zeros. Channels are averaged. WAV files with samples of 8, 16 or 32 bits need no further package; others
    need ``soundfile``. In ``predict``, the folder may hold recordings directly, and ``labels`` are absent.

    Args:
        source: A folder with a subfolder of recordings for each class.
        validation: The folder of the validation split, or ``None``.
        test: The folder of the test split, or ``None``.
        sampling_rate: Samples per second that the model expects. A file with another rate is refused.
        max_seconds: Longer recordings are cut at the end.
        **options: ``predict`` (a folder), ``validation_fraction``, ``batch_size`` and ``num_workers``, as for
            :class:`TableDataModule`.

    Example::

        AudioFolderData("words", validation_fraction=0.2, max_seconds=1.0)
    """

    suffixes = frozenset({".wav", ".flac", ".ogg", ".mp3"})
    kind = "audio"

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        sampling_rate: int = 16000,
        max_seconds: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(source, validation=validation, test=test, **options)
        if sampling_rate < 1 or max_seconds <= 0:
            raise InputError(f"sampling_rate={sampling_rate} and max_seconds={max_seconds} must be positive.")
        self.sampling_rate, self.max_seconds = sampling_rate, max_seconds

    def check_file(self, path: Path) -> None:
        """Check that the file can be read as audio and has the expected sampling rate."""
        samples, rate = _read(path, 1)
        if rate != self.sampling_rate:
            raise InputError(
                f"{str(path)!r} has {rate} samples per second, but the model expects {self.sampling_rate}: convert it "
                f"(ffmpeg -i in.wav -ar {self.sampling_rate} out.wav), or pass sampling_rate={rate} if the model "
                f"expects that."
            )
        if not len(samples):
            raise InputError(f"{str(path)!r} has no sound: remove it.")

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_values`` and ``attention_mask``, ``(batch, samples)``, and ``labels`` except in ``predict``."""
        waves = [_read(Path(e["file"]), round(self.max_seconds * self.sampling_rate))[0] for e in examples]
        waves = [(sound - sound.mean()) / (sound.std(correction=0) + 1e-7) for sound in waves]
        masks = [torch.ones(len(sound), dtype=torch.long) for sound in waves]
        batch = {"input_values": pad_sequence(waves, True), "attention_mask": pad_sequence(masks, True)}
        return batch if split == "predict" else {**batch, "labels": torch.tensor([e["label"] for e in examples])}


def _read(path: Path, samples: int) -> tuple[Tensor, int]:
    """Up to ``samples`` samples of a recording, averaged over its channels, and its sampling rate."""
    if path.suffix.lower() == ".wav":
        with wave.open(str(path)) as file:
            rate, channels, bits = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            if bits in _INTEGERS:
                data = bytearray(file.readframes(samples))
                found = torch.frombuffer(data, dtype=_INTEGERS[bits]).float() if data else torch.zeros(0)
                # Samples of 8 bits are unsigned, and silence is in the middle of their range.
                return ((found - (128 if bits == 8 else 0)) / 2 ** (bits - 1)).view(-1, channels).mean(1), rate
    try:
        import soundfile
    except ImportError as error:
        raise InputError(f"{str(path)!r} needs the package soundfile: install it, or convert it to WAV.") from error
    read, rate = soundfile.read(path, frames=samples, dtype="float32", always_2d=True)
    return torch.from_numpy(read).mean(1), rate
