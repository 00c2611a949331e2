"""Write checkpoint files in one step, so that a run that is killed while it saves keeps its previous checkpoint.

Lightning writes to the system's folder for temporary files and moves the file from there. If that folder is on another
file system, the move is a copy over the previous checkpoint, and a kill or a full disk in the middle of the copy
destroys it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lightning_peft.core.class_swap import add_mixin, original_class
from lightning_peft.core.state.atomic_file import save_torch_file

__all__ = ["save_in_one_step"]

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
else:
    TorchCheckpointIO = object  # added to an object of lightning's or of pytorch_lightning's class


class _OneStepSave(TorchCheckpointIO):
    """Mixin for Lightning's default CheckpointIO: a local file keeps its content until the new one is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_torch_file(checkpoint, str(path).removeprefix("file://"))


def save_in_one_step(strategy: Any) -> None:
    """Change how ``strategy`` writes checkpoint files; a user's own CheckpointIO is kept.

    With the change, saving raises OSError if the file cannot be written, and the previous file is unchanged.
    """
    innermost = strategy.checkpoint_io
    while getattr(innermost, "checkpoint_io", None) is not None:  # such as AsyncCheckpointIO
        innermost = innermost.checkpoint_io
    # By name, because Lightning's two packages each have this class. A subclass may write the file in its own way.
    if original_class(innermost).__name__ == "TorchCheckpointIO":
        add_mixin(innermost, _OneStepSave)
