"""What every adapter directory says: PEFT's common options, and our own facts beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.formats.files import FormatError
from lightning_peft.formats.snapshot import Snapshot

__all__ = ["METADATA", "common_options", "own_facts", "task_type"]

#: the key of our own facts in the metadata of the tensors' file, which PEFT ignores
METADATA = "lightning_peft"

#: the end of a Hugging Face class name -> PEFT's task, and the heads it then looks for by itself
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def common_options(snapshot: Snapshot, peft_type: str) -> dict[str, Any]:
    """PEFT's options that say what ``snapshot`` is and where it belongs."""
    facts, task = snapshot.base.facts(), task_type(snapshot)
    auto = {"base_model_class": facts["class"], "parent_library": facts["library"]}
    return {
        "peft_type": peft_type,
        "task_type": task,
        "auto_mapping": auto if task is None and facts["pretrained"] else None,
        "base_model_name_or_path": facts["name_or_path"],
        "revision": facts["revision"],
        "inference_mode": True,
    }


def task_type(snapshot: Snapshot) -> str | None:
    """PEFT's task, or None.

    With a task PEFT looks for the heads that are usual for it, and fails where the file has none: without one of them
    no task is told.
    """
    facts = snapshot.base.facts()
    for end, (task, heads) in _TASKS.items():
        if facts["pretrained"] and facts["class"].endswith(end):
            return task if not heads or set(heads) & set(snapshot.heads) else None
    return None


def own_facts(metadata: Mapping[str, str], where: Path) -> dict[str, Any]:
    """What this package added to a tensor file's metadata; empty for a file of PEFT's.

    Raises:
        FormatError: it is no JSON object.
    """
    try:
        facts = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the metadata {METADATA!r} is no JSON: {error}") from error
    parts = (facts.get("config", {}), facts.get("fingerprint", {})) if isinstance(facts, dict) else ()
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise FormatError(f"{where}: the metadata {METADATA!r} is no JSON object with the method's configuration")
    return facts
