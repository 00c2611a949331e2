"""Find and load pretrained models: the embedded one, a local folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lightning_peft import demo

#: a model's folder may contain Python files, which are never run; build such a model in your own module
NO_CODE = {"trust_remote_code": False}
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "config.json")


class InputError(ValueError):
    """A file, column, row or argument that a task or DataModule cannot use. The command line shows it as one line."""


def locate(model: str, marks: tuple[str, ...] = ("config.json",)) -> str:
    """Resolve a model's name to an argument of ``from_pretrained``.

    Args:
        model: ``"demo"``, the path of a folder with one of ``marks``, or a hub id (``"org/name"``).
        marks: files that identify a model folder.

    Returns:
        The folder's path, or the unchanged hub id.

    Raises:
        FileNotFoundError: if ``model`` is a path, but the folder does not exist or does not contain a model.
    """
    if model == "demo":
        return str(demo.MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        if any((path / mark).is_file() for mark in marks):
            return str(path)
        inside = sorted(child.parent.name for child in path.glob(f"*/{marks[0]}"))
        hint = f"; its folder {inside[0]!r} has one" if inside else ""
        raise FileNotFoundError(f"{model!r} is not a Hugging Face model folder: it has no {marks[0]}{hint}.")
    if is_folder(model):
        siblings = [child.name for child in path.parent.glob("*") if child.is_dir()]
        near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise FileNotFoundError(f"there is no model folder {model!r}{hint}.")
    return model


def public_name(model: str) -> str:
    """Invert :func:`locate`: the embedded model is ``"demo"``, wherever it is installed."""
    return "demo" if Path(model).parts[-3:] == demo.MODEL.parts[-3:] else model


def is_folder(model: str) -> bool:
    """True if a name is that of a folder, existing or not. A hub id has at most one slash and no path prefix."""
    path = Path(model).expanduser()
    return path.is_dir() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1


def load_model(auto_class: Any, model: str, pretrained: bool, dtype: str | None, **config: Any) -> Any:
    """Build a transformers model, with its weights or with random ones.

    Args:
        auto_class: A transformers auto class (``AutoModelForMaskedLM``).
        model: The model, as for :func:`locate`.
        pretrained: ``False`` builds the same network with random weights from torch's global generator.
        dtype: The parameters' dtype (``"float32"``); ``None`` keeps the stored one.
        **config: Changes to the model's configuration.

    Returns:
        The model in train mode. :func:`fresh_modules` names its parts that ``model`` has no weights for.

    Raises:
        InputError: if ``dtype`` is not the name of a torch dtype, ``config`` requires remote code, the model
            cannot be found, or the weights are those of another network.
        ValueError: if the model requires remote code.
    """
    import torch
    from transformers import AutoConfig

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype!r} is not a torch dtype: use float32, bfloat16, float16 or None.")
    if refused := sorted(config.keys() & {"trust_remote_code", "code_revision"}):
        raise InputError(f"config={refused}: code in model folders is never run; build the model in your own module")
    where = locate(model)
    try:
        configuration = AutoConfig.from_pretrained(where, **config, **NO_CODE)
    except OSError as error:
        raise InputError(
            f"model={model!r} is neither a folder nor a model of the Hugging Face hub that can be reached: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if pretrained:
        # A head of another width is expected: its stored weights are replaced by fresh ones.
        network, loading = auto_class.from_pretrained(
            where, config=configuration, output_loading_info=True, ignore_mismatched_sizes=True, **NO_CODE
        )
        fresh = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
        stored = {name: parameter.numel() for name, parameter in network.named_parameters()}
        if 2 * sum(stored.get(key, 0) for key in fresh) > sum(stored.values()):
            raise InputError(
                f"the weights of {model!r} do not fit {type(network).__name__}: {len(fresh)} of its {len(stored)} "
                f"parameters are missing there ({', '.join(sorted(fresh)[:3])}, ...). Use another model, or "
                "pretrained=False for random weights."
            )
        network.__dict__["_fresh_keys"] = sorted(fresh & stored.keys())
    else:
        network = auto_class.from_config(configuration)
    network.train()  # from_pretrained returns it in eval mode, in which Lightning would train it without dropout
    return network if dtype is None else network.to(getattr(torch, dtype))


def fresh_modules(network: Any) -> list[str]:
    """Names of the modules of a model from :func:`load_model` whose weights are random although it is pretrained.

    A module with stored weights is not one of them, even if the configuration added a bias to it, which starts at zero.
    """
    fresh = set(network.__dict__.get("_fresh_keys", ()))
    owners = dict.fromkeys(key.rpartition(".")[0] for key in sorted(fresh))
    own = {name: dict(network.get_submodule(name).named_parameters(prefix=name, recurse=False)) for name in owners}
    return [name for name, parameters in own.items() if parameters.keys() <= fresh]


def load_tokenizer(model: str) -> Any:
    """Load a model's tokenizer. If it has no padding token, it pads with its end-of-text token.

    Raises:
        InputError: if the tokenizer has neither token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate(model, _TOKENIZER), **NO_CODE)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of {model!r} has no padding token and no end-of-text token, so texts of different "
                "lengths cannot form a batch: set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
