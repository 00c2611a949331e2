"""Which rows a recomputation under gradient checkpointing belongs to: those of the forward it repeats.

Backward runs checkpointed forwards again, usually after the context that named the rows has been left, and maybe while
another one is open. ``torch.utils.checkpoint`` gives each such forward a frame of its own, which its hooks for saved
tensors hold while it runs for the first time and again; what was noted under the frame then is looked up by it.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch

__all__ = ["checkpoint_frame", "in_backward", "recall", "remember"]

_NOTES: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def in_backward() -> bool:
    """Whether backward is running, so that a forward inside it is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def checkpoint_frame() -> Any:
    """The frame of the checkpoint around the forward in progress; None without one, or with ``use_reentrant=True``."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack: Any = inspect.unwrap(hooks[0]) if hooks is not None else None
    code = getattr(pack, "__code__", None)
    cells = dict(zip(code.co_freevars, pack.__closure__ or ())) if code is not None else {}
    if "target_frame_ref" in cells:
        return cells["target_frame_ref"].cell_contents()
    found = cells["frame"].cell_contents if "frame" in cells else None
    return found if isinstance(found, torch.utils.checkpoint._CheckpointFrame) else None


def remember(frame: Any, key: Any, value: Any) -> None:
    """Keep ``value`` under ``key`` for as long as the frame lives."""
    _NOTES.setdefault(frame, {})[key] = value


def recall(frame: Any, key: Any) -> Any:
    """What :func:`remember` kept; None without any."""
    return _NOTES.get(frame, {}).get(key)
