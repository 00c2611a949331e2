"""``lightning-peft merge``: merge trained adapters into their base, and write the plain model."""

from __future__ import annotations

import shutil
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.cli.adapted import activate, add_base_option, load_adapted
from lightning_peft.cli.module import add_model_option, parse
from lightning_peft.core.adapters.lookup import active_names, adapter_names
from lightning_peft.core.optional import config_value, input_embedding, output_embedding
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.atomic_file import save_torch_file, writing
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.sites import output_head

__all__ = ["check_new", "hugging_face", "merge", "write_plain"]

EXAMPLE = """examples:
  lightning-peft merge run.ckpt out/                       the base was built by a task of this package
  lightning-peft merge run.ckpt out/ --model my.Module     the base was built by your own class
  lightning-peft merge run.ckpt model.pt                   a state dict in one file (.pt or .safetensors)
  lightning-peft merge adapter/ out/ --base path/to/base   an adapter directory"""

#: files of a Hugging Face folder that belong to the model and are copied with the weights
_OTHER_FILES = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("preprocessor_config.json", "processor_config.json", "chat_template*", "generation_config.json"),
]


def merge(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: the command-line arguments after ``merge``.

    Raises:
        StateError: if the source cannot be read or built, or the output exists already.
        MergeError: if some adapters cannot be merged; the message gives a reason for each. Nothing is written.
    """
    parser = ArgumentParser(
        prog="lightning-peft merge",
        description="Merge trained adapters into their base, and write the plain model: a Hugging Face folder if the\n"
        "base is a Hugging Face model, otherwise a state dict with the base's own keys.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the checkpoint of a run, or an adapter directory")
    parser.add_argument("out", type=Path, help="a new folder, or a new .safetensors or .pt file for a state dict")
    add_model_option(parser, "the class of the trained module (not needed for a task of this package)")
    add_base_option(parser)
    parser.add_argument("--name", help="merge only this adapter; default: the active adapters")
    parser.add_argument(
        "--untie", action="store_true", help="give a tied weight its own tensor if only one of its modules changes"
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="replace the adapted quantised layers by float ones with merged weights",
    )
    given, of_model = parse(parser, arguments)
    check_new(given.out)
    model = load_adapted(given.source, given.model, of_model, given.base)
    if given.name is not None:
        activate(model, given.name, given.source)
    record = injection_state(model)
    names = list(record.methods) if record is not None else []
    active = active_names(model)
    idle = [n for n in adapter_names(model) if n not in active]
    lp.merge(model, untie=given.untie, dequantize=given.dequantize)
    lp.unload(model, merge=True)
    merged = ", ".join(n for n in names if n not in idle)
    left = f" ({', '.join(idle)} left out: not active)" if idle else ""
    print(f"merged {merged} into {write_plain(model, given.out)}{left}")


def check_new(out: Path) -> None:
    """Refuse an output that exists already, unless it is an empty folder."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise StateError(f"{out} already exists: name a new folder or file")


def write_plain(model: nn.Module, out: Path) -> Path:
    """Write a plain model, completely or not at all."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        return _write_beside(model, out)


def _write_beside(model: nn.Module, out: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as folder:
        made = Path(folder) / out.name
        inner = hugging_face(model)
        if out.suffix in (".pt", ".safetensors"):
            state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
            _save(state, made)
        elif inner is not None:
            _save_pretrained(inner, made)
        else:
            made.mkdir()
            _save(model.state_dict(), made / "model.safetensors")
        if out.is_dir():
            out.rmdir()
        shutil.move(made, out)
    return out


def _save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".pt":
        save_torch_file(state, path)
    else:  # safetensors cannot store a tensor under two names, so tied tensors are written twice
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in state.items()}, path)


def hugging_face(model: nn.Module) -> Any:
    """Return ``model`` or the module inside it that is a Hugging Face model with all of its parameters, else None."""
    own = {id(p) for p in model.parameters()}
    for module in model.modules():
        holds = {id(p) for p in module.parameters()} == own
        if holds and callable(getattr(module, "save_pretrained", None)) and hasattr(module, "config"):
            return module
    return None


def _save_pretrained(model: Any, out: Path) -> None:
    config = model.config
    first, last = input_embedding(model), output_embedding(model)
    if first is not None and last is not None and first.weight is not last.weight:
        config.tie_word_embeddings = False
    head = output_head(model)
    outputs = len(model.get_submodule(head).weight) if head is not None else None
    if "Classification" in type(model).__name__ and outputs not in (None, config.num_labels):
        config.num_labels = outputs  # the adapter has a head of another width
    model.save_pretrained(out)
    source = Path(config_value(config, "_name_or_path", ""))
    for pattern in _OTHER_FILES if source.is_dir() else ():
        for path in source.glob(pattern):
            if path.is_file() and not (out / path.name).exists():
                shutil.copy(path, cast(Path, out))
