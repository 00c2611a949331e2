"""The names that parameters are known by."""

from __future__ import annotations

__all__ = ["canonical"]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(key: str) -> str:
    """``key`` without the parts that ``torch.compile`` and wrappers put into names."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
