"""The model card of an adapter directory: ``README.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.pretrained import is_folder

__all__ = ["model_card"]


def model_card(snapshot: Snapshot, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the text of the model card: what the adapter is, what it was trained on, how to load it.

    Args:
        snapshot: The snapshot of the method.
        config: The content of ``adapter_config.json``.
        tensors: The tensors of ``adapter_model.safetensors``.
    """
    method, native, path = snapshot.method, config["peft_type"] == "LIGHTNING_PEFT", config["base_model_name_or_path"]
    # The path of a local folder means nothing to other readers, so only its last part is shown. The Hub accepts only
    # its own model ids as base_model.
    base = Path(path).name if path and is_folder(path) else path
    on_hub = bool(base) and base == path != "demo"
    head = {"library_name": "lightning_peft" if native else "peft", **({"base_model": base} if on_hub else {})}
    tags = ["lightning_peft", type(method).__name__.lower()]
    rows = {
        "method": type(method).__name__,
        "base": f"`{base or snapshot.base.facts()['class']}`",
        "task": config.get("task_type"),
        "values": f"{sum(t.numel() for t in tensors.values()):,} in {len(tensors)} tensors",
        "adapted": f"{len(snapshot.adapter_records)} weights or modules" if snapshot.adapter_records else None,
        "trained in full": ", ".join(f"`{name}`" for name in snapshot.heads),
        **{f"`{name}`": f"{value:.6g}" for name, value in snapshot.metrics.items()},
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items() if value)
    return f"""---
{_front_matter({**head, "tags": tags})}
---

# {type(method).__name__} adapter{f" for {base}" if base else ""}

| | |
|---|---|
{table}

## Load it

In a LightningModule, or any module that holds the base:

```python
import lightning_peft as lp

lp.load_adapter(model, "path/to/this/directory")
```
{_NATIVE.format(reason=config.get("reason", "")) if native else _PEFT}
This directory holds only the adapter. Load it onto the base model named above: `lightning_peft` compares the base's \
weights with those it was trained on.
"""


_PEFT = """
With Hugging Face PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/directory")
```
"""
_NATIVE = """
Hugging Face PEFT cannot read this adapter: {reason}
"""


def _front_matter(values: Mapping[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_quoted(entry)}" for entry in value)]
        else:
            lines.append(f"{key}: {_quoted(value)}")
    return "\n".join(lines)


def _quoted(value: str) -> str:
    plain = all(c.isalnum() or c in "/_-." for c in value) and value[:1].isalnum()
    return value if plain else "'" + value.replace("'", "''").replace("\n", " ") + "'"
