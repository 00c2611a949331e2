"""``lightning-peft export``: write trained adapters as directories that PEFT reads, or as files of other software."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import lightning_peft as lp
from lightning_peft.cli.adapted import activate, add_base_option, load_adapted
from lightning_peft.cli.merge import check_new, hugging_face, write_plain
from lightning_peft.cli.module import add_model_option, load_module, parse
from lightning_peft.core.adapters.lookup import active_names, adapter_names
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_model import base_of
from lightning_peft.formats.checkpoint import export_checkpoint
from lightning_peft.formats.directory.files import read_files

__all__ = ["export"]

MAX_ERROR = 0.01  #: of the update's Frobenius norm

EXAMPLE = """examples:
  lightning-peft export run.ckpt adapter/                            for Hugging Face PEFT and this package
  lightning-peft export run.ckpt out/ --for vllm                     a plain LoRA, checked against vLLM's rules
  lightning-peft export run.ckpt out/ --for vllm --merged            the merged model as a Hugging Face folder
  lightning-peft export run.ckpt lora.gguf --for llama.cpp           a plain LoRA as a GGUF file
  lightning-peft export run.ckpt model.onnx --for onnx               the merged model, checked by onnxruntime
  lightning-peft export run.ckpt model.pt2 --for torch-export        the merged model, for torch.export.load"""


def export(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``export``.

    Raises:
        StateError: if the source cannot be read, or cannot be exported for that software. Nothing is written.
    """
    parser = ArgumentParser(
        prog="lightning-peft export",
        description="Write the adapters of a checkpoint as adapter directories, in Hugging Face PEFT's format if\n"
        "PEFT has the method. Most methods need only the checkpoint; others also need the trained class (--model).\n"
        "With --for, write files that other software runs.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the checkpoint of a run; with --for also an adapter directory")
    parser.add_argument(
        "out", type=Path, help="the output folder or file; several adapters are written to subfolders with their names"
    )
    parser.add_argument("--name", help="export only this adapter; default: all adapters, or with --for the active one")
    parser.add_argument(
        "--fold-scale", action="store_true", help="LoRA: bake the scale into B, for tools that ignore alpha"
    )
    parser.add_argument("--for", dest="software", choices=sorted(SOFTWARE), help="the software that will run the model")
    parser.add_argument("--merged", action="store_true", help="vllm, llama.cpp: write the merged model, not a LoRA")
    parser.add_argument("--rank", type=int, help="the rank of the LoRA; default: the smallest that keeps the error")
    parser.add_argument(
        "--max-error",
        type=float,
        help=f"the largest relative error of the update in the Frobenius norm (default: {MAX_ERROR})",
    )
    add_base_option(parser)
    add_model_option(parser, "the class of the trained module, if the checkpoint is not enough")
    given, arguments = parse(parser, args)
    _check_options(given)
    if given.software is not None:
        check_new(given.out)
        model = load_adapted(given.source, given.model, arguments, given.base).eval()
        if given.name is not None:
            activate(model, given.name, given.source)
        try:
            SOFTWARE[given.software](model, given)
        except ModuleNotFoundError as error:
            raise StateError(
                f"--for {given.software} needs the package {error.name}, which is not installed: "
                "pip install 'lightning_peft[deploy]'"
            ) from error
    else:
        _as_directories(given, arguments)


def _check_options(given: Any) -> None:
    """Refuse an option that would have no effect."""
    lora = given.software in ("vllm", "llama.cpp")
    needs = {
        "--fold-scale": (given.fold_scale, given.software is None, "without --for"),
        "--base": (given.base, given.software is not None, "with --for"),
        "--merged": (given.merged, lora, "with --for vllm or llama.cpp"),
        "--rank": (given.rank, lora and not given.merged, "with --for vllm or llama.cpp, without --merged"),
        "--max-error": (given.max_error, lora and not given.merged, "with --for vllm or llama.cpp, without --merged"),
    }
    for option, (value, applies, when) in needs.items():
        if value not in (None, False) and not applies:
            raise StateError(f"{option} only has an effect {when}: leave it out")
    if given.max_error is None:
        given.max_error = MAX_ERROR


def _as_directories(given: Any, arguments: dict[str, Any]) -> None:
    if given.model is None:
        names = export_checkpoint(given.source, given.out, given.name, fold_scale=given.fold_scale)
    else:
        module = load_module(given.source, given.model, arguments)
        names = lp.save_adapter(module, given.out, given.name, fold_scale=given.fold_scale)
    print(f"{given.out}: {', '.join(names)}", file=sys.stderr)
    for name in names:
        folder = given.out / name if len(names) > 1 else given.out
        if (reason := read_files(folder).config.get("reason")) is not None:
            print(f"{folder}: only this package can read it, Hugging Face PEFT cannot: {reason}", file=sys.stderr)


def _only_adapter(model: nn.Module, given: Any) -> str:
    """The name of the adapter to export.

    Raises:
        StateError: if there is not exactly one.
    """
    active = [name for name in adapter_names(model) if name in active_names(model)]
    if len(active) != 1:
        raise StateError(
            f"{given.source} has the active adapters {active}, but one LoRA replaces one adapter: choose it with "
            "--name, or export the merged model (--merged)"
        )
    return active[0]


def _write_merged(model: nn.Module, out: Path) -> Path:
    if hugging_face(model) is None:
        raise StateError(
            "the merged model is not a Hugging Face model, and only those can be loaded there: use --for onnx or "
            "torch-export"
        )
    lp.merge(model)
    lp.unload(model, merge=True)
    return write_plain(model, out)


def _for_vllm(model: nn.Module, given: Any) -> None:
    from lightning_peft.formats.deploy.plain_lora import plain_lora
    from lightning_peft.formats.deploy.vllm import MAX_RANK, check_adapter, server_rank

    if given.merged:
        print(f"{_write_merged(model, given.out)}: the merged model\nvllm serve {given.out}")
        return
    name = _only_adapter(model, given)
    lora = plain_lora(model, name, "vLLM", given.max_error, given.rank, MAX_RANK)
    check_adapter(lora.config, lora.tensors)
    lora.write(given.out)
    base = lora.config["base_model_name_or_path"] or "BASE"
    print(
        f"{given.out}: a LoRA of rank {lora.rank}, relative error {lora.error:.3g}\n"
        f"vllm serve {base} --enable-lora --max-lora-rank {server_rank(lora.rank)} --lora-modules {name}={given.out}"
    )


def _for_llama_cpp(model: nn.Module, given: Any) -> None:
    from lightning_peft.formats.deploy.llama_cpp import write_lora
    from lightning_peft.formats.deploy.plain_lora import plain_lora

    if given.merged:
        print(f"{_write_merged(model, given.out)}: the merged model\npython convert_hf_to_gguf.py {given.out}")
        return
    _check_ending(given.out, ".gguf")
    name = _only_adapter(model, given)
    lora = plain_lora(model, name, "llama.cpp", given.max_error, given.rank)
    base = base_of(model).module
    write_lora(lora, original_class(base).__name__, getattr(base, "config", None), given.out)
    print(
        f"{given.out}: a LoRA of rank {lora.rank}, relative error {lora.error:.3g}\n"
        f"llama-cli --model BASE.gguf --lora {given.out}"
    )


def _for_onnx(model: nn.Module, given: Any) -> None:
    from lightning_peft.formats.deploy.programs import write_onnx

    _check_ending(given.out, ".onnx")
    sizes = write_onnx(_merged_program(model), given.out)
    print(f"{given.out}: the merged model, for {sizes}; onnxruntime computes the same outputs")


def _for_torch_export(model: nn.Module, given: Any) -> None:
    from lightning_peft.formats.deploy.programs import write_torch_export

    _check_ending(given.out, ".pt2")
    sizes = write_torch_export(_merged_program(model), given.out)
    print(f"{given.out}: the merged model, for {sizes}; torch.export.load computes the same outputs")


def _merged_program(model: nn.Module) -> Any:
    from lightning_peft.formats.deploy.programs import program_of

    lp.merge(model)
    lp.unload(model, merge=True)
    return program_of(model, hugging_face(model))


def _check_ending(path: Path, ending: str) -> None:
    if path.suffix != ending:
        raise StateError(f"{path} is the name of a file that must end with {ending}: use {path}{ending}")


#: software -> the function that writes a model for it
SOFTWARE: dict[str, Callable[[nn.Module, Any], None]] = {
    "vllm": _for_vllm,
    "llama.cpp": _for_llama_cpp,
    "onnx": _for_onnx,
    "torch-export": _for_torch_export,
}
