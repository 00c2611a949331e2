"""Remember values for the recomputation of a forward under gradient checkpointing.

Backward repeats checkpointed forwards, usually after the context that selected their adapters (``lp.active``,
``lp.rows``) has exited, and possibly while another one is open. The recomputation must use the selection of the first
run. ``torch.utils.checkpoint`` creates one frame object per checkpointed forward, and its saved-tensor hooks hold this
frame in both runs. Values are stored by frame in the first run and looked up in the recomputation.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch

__all__ = ["checkpoint_frame", "in_backward", "recall", "remember"]

# Weak keys: torch frees the frame when the graph is freed, and the values go with it.
_NOTES: weakref.WeakKeyDictionary[object, dict[object, Any]] = weakref.WeakKeyDictionary()


def in_backward() -> bool:
    """Whether backward is running, so that a forward inside it is a recomputation."""
    return torch._C._current_graph_task_id() != -1  # -1 outside of backward; torch has no public function for this


def checkpoint_frame() -> Any:
    """Return the frame of the checkpoint around the forward in progress; None without a non-reentrant checkpoint.

    torch has no public function for this. The frame is a closure variable of the saved-tensor hook that is active
    while a checkpointed forward runs: ``frame`` in the first run, ``target_frame_ref`` (weak) in the recomputation.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack: Any = inspect.unwrap(hooks[0]) if hooks is not None else None
    code = getattr(pack, "__code__", None)
    cells = dict(zip(code.co_freevars, pack.__closure__ or ())) if code is not None else {}
    if "target_frame_ref" in cells:
        return cells["target_frame_ref"].cell_contents()
    found = cells["frame"].cell_contents if "frame" in cells else None
    return found if isinstance(found, torch.utils.checkpoint._CheckpointFrame) else None


def remember(frame: object, key: object, value: object) -> None:
    """Store ``value`` under ``key`` for as long as the frame lives."""
    _NOTES.setdefault(frame, {})[key] = value


def recall(frame: object, key: object) -> Any:
    """Return what :func:`remember` stored; None if nothing was stored."""
    return _NOTES.get(frame, {}).get(key)
