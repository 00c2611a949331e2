"""PEFT's options that every adapter directory has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_peft.core.optional import config_value
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import NotInPeftError
from lightning_peft.pretrained import public_name

__all__ = ["common_options", "shared_modules_of", "task_of"]

#: suffix of a Hugging Face class name -> PEFT's task, and the heads that PEFT then adds to modules_to_save
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "Model": ("FEATURE_EXTRACTION", ()),
}


def common_options(snapshot: Snapshot, peft_type: str) -> dict[str, Any]:
    """PEFT's options that identify the method, the task and the base model of ``snapshot``."""
    facts = snapshot.base.facts()
    task = snapshot.origin["task_type"] if "task_type" in snapshot.origin else _task_type(snapshot)
    auto = {"base_model_class": facts["class"], "parent_library": facts["library"]}
    return {
        "peft_type": peft_type,
        "task_type": task,
        "auto_mapping": auto if task is None and facts["pretrained"] else None,
        "base_model_name_or_path": public_name(name) if (name := facts["name_or_path"]) else None,
        "revision": facts["revision"],
        "inference_mode": True,
    }


def shared_modules_of(base: Base, modules: Iterable[str]) -> dict[str, list[str]]:
    """Map each of ``modules`` that has several names in the base to the other names, which PEFT does not adapt."""
    shared = base.facts().get("shared", {})
    return {name: shared[name] for name in modules if name in shared}


def task_of(base: Base) -> tuple[str, tuple[str, ...]]:
    """PEFT's task for a transformers model, and the name suffixes of the heads that PEFT then expects.

    Raises:
        NotInPeftError: if PEFT has no task for the model.
    """
    facts = base.facts()
    if not facts["pretrained"]:
        raise NotInPeftError(f"PEFT has tasks for transformers models only, and {facts['class']} is not one")
    main = getattr(base.module, "main_input_name", "input_ids")
    if main != "input_ids":
        raise NotInPeftError(f"PEFT's tasks pass input_ids first, but {facts['class']} takes {main}")
    for end, found in _TASKS.items():
        if facts["class"].endswith(end) and (found[0] != "SEQ_2_SEQ_LM" or _encodes(base)):
            return found
    raise NotInPeftError(f"PEFT has no task for {facts['class']}, only for classes that end in {', '.join(_TASKS)}")


def _encodes(base: Base) -> bool:
    """Whether the base is an encoder-decoder; some image-text decoders are called ``ForConditionalGeneration`` too."""
    return bool(config_value(getattr(base.module, "config", None), "is_encoder_decoder", False))


def _task_type(snapshot: Snapshot) -> str | None:
    """PEFT's task; None if there is none, and PEFT then loads the adapter onto any model.

    With a task, PEFT expects the usual heads of that task and fails if the file does not have them. With
    FEATURE_EXTRACTION it passes token ids even to models that take images.
    """
    try:
        task, heads = task_of(snapshot.base)
    except NotInPeftError:
        return None
    told = task != "FEATURE_EXTRACTION" and (not heads or set(heads) & set(snapshot.heads))
    return task if told else None
