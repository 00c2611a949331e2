"""``lightning-peft serve``: answer HTTP requests with one base model and a folder of adapters."""

from __future__ import annotations

import functools
import importlib
import os
import re
import socket
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from lightning_peft.cli.module import add_model_option, build_module, parse
from lightning_peft.core.state.state_dict import StateError

if TYPE_CHECKING:
    from lightning_peft.serving.server import Served

__all__ = ["serve"]

_KEY = "LIGHTNING_PEFT_API_KEY"


def serve(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``serve``.

    Raises:
        StateError: if the packages of ``lightning_peft[serve]`` are missing, or the model cannot be built.
        FileNotFoundError: if the folder of adapters does not exist.
    """
    options, arguments = parse(_parser(), args)
    try:
        from lightning_peft.serving import server
        from lightning_peft.serving.routes import Limits
    except ModuleNotFoundError as error:
        raise StateError(f"serve needs {error.name}: pip install 'lightning_peft[serve]'") from error
    _check_address(options.host, options.port)
    limits = Limits(options.max_body, options.max_queue, options.timeout, options.max_new_tokens)
    print(f"serving {options.model} on http://{options.host}:{options.port}", file=sys.stderr)
    try:
        server.serve(
            functools.partial(
                _build, options.model, arguments, options.tokenizer, options.data, yaml.safe_load(options.data_args)
            ),
            options.adapters,
            host=options.host,
            port=options.port,
            base=options.name,
            accelerator=options.accelerator,
            max_batch_size=options.max_batch_size,
            max_memory=options.max_memory,
            api_key=options.api_key,
            limits=limits,
        )
    except RuntimeError as error:
        raise StateError(str(error)) from error


def _parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(
        prog="lightning-peft serve",
        description="Answer HTTP requests with one base model and a folder of adapters. Each request names its "
        "adapter, or none for the base; requests for different adapters run in one batch.",
    )
    add_model_option(parser, "the class of the base, a LightningModule", required=True)
    parser.add_argument(
        "--adapters",
        required=True,
        metavar="DIR",
        help="the folder of adapter directories; the name of a subfolder is the name of its adapter",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts other machines; default: %(default)s")
    parser.add_argument("--port", type=_port, default=8000, help="default: %(default)s")
    parser.add_argument("--name", default="base", help="the model name that selects the base; default: %(default)s")
    parser.add_argument(
        "--data", metavar="CLASS", help="a DataModule that prepares texts or other rows, such as TextClassificationData"
    )
    parser.add_argument("--data_args", default="{}", help="its arguments as YAML, such as '{text: question}'")
    parser.add_argument(
        "--tokenizer", help="the tokenizer of a language model, a folder or hub id; default: the model's own"
    )
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument(
        "--max_batch_size",
        type=_count,
        default=32,
        help="maximum number of rows that run together; default: %(default)s",
    )
    parser.add_argument(
        "--max_memory", type=_bytes, help="memory for loaded adapters, such as 500MB or 2GB; default: no limit"
    )
    parser.add_argument(
        "--max_queue",
        type=_count,
        default=256,
        help="maximum number of requests that run or wait; default: %(default)s",
    )
    parser.add_argument(
        "--max_body", type=_bytes, default="4MB", help="largest body of a request; default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=60, help="maximum time for a request, in seconds; default: %(default)s"
    )
    parser.add_argument(
        "--max_new_tokens", type=_count, default=256, help="maximum number of tokens to generate; default: %(default)s"
    )
    parser.add_argument(
        "--api_key",
        default=os.environ.get(_KEY),
        help=f"refuse requests without this key; setting the variable {_KEY} is safer, because other users cannot "
        f"see it",
    )
    return parser


def _check_address(host: str, port: int) -> None:
    """Refuse an address that is in use before the model is loaded, which may take minutes.

    Raises:
        StateError: if the server cannot listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StateError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port") from error


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ArgumentTypeError(f"{text!r} is not a port: expected a number from 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _bytes(text: str) -> int:
    """Read a size, such as ``500MB`` or ``2GB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is not a size: write 500MB or 2GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _build(
    name: str, arguments: Mapping[str, Any], tokenizer: str | None, data: str | None, data_args: Mapping[str, Any]
) -> Served:
    """Build the served module; runs in the model's process.

    Raises:
        StateError: if a class cannot be built, or no tokenizer is known.
    """
    from lightning_peft.serving.predictor import DataInputs
    from lightning_peft.serving.server import Served

    module = build_module(name, arguments)
    network = next((m for m in module.modules() if _generates(m)), None)
    if network is not None:
        return Served(module, network, _tokenizer(module, name, tokenizer))
    if data is None:
        return Served(module)
    package, _, last = data.rpartition(".")
    try:
        built = getattr(importlib.import_module(package or "lightning_peft.data"), last)(**data_args)
    except (ImportError, AttributeError, TypeError) as error:
        raise StateError(f"--data {data} cannot be built with --data_args {data_args}: {error}") from error
    if hasattr(built, "tokenizer"):
        built.tokenizer = _tokenizer(module, name, tokenizer)
    return Served(module, inputs=DataInputs(module, built))


def _tokenizer(module: Any, name: str, wanted: str | None) -> Any:
    """Return the tokenizer that the user names, or else that of the module or of its model."""
    from lightning_peft.pretrained import load_tokenizer

    model = wanted or getattr(module, "hparams", {}).get("model")
    if isinstance(model, str):
        return load_tokenizer(model)
    if (own := getattr(module, "tokenizer", None)) is not None:
        return own
    raise StateError(f"{name} does not say which tokenizer it uses: pass --tokenizer, a model's folder or hub id")


def _generates(module: Any) -> bool:
    """Whether ``module`` is a causal language model of transformers."""
    if not callable(getattr(module, "can_generate", None)) or not callable(getattr(module, "generate", None)):
        return False
    return module.can_generate() and not getattr(module.config, "is_encoder_decoder", False)
