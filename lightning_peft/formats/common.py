"""The options that every adapter of PEFT's has: what it is, for which task, and on which base."""

from __future__ import annotations

from typing import Any

from lightning_peft.formats.snapshot import Snapshot

__all__ = ["common_options", "task_type"]

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
