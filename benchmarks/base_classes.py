"""Adapt, save and load every base class of transformers that can be built from a small configuration.

    python -m benchmarks.base_classes --out classes.json --markdown benchmarks/results/base_classes.md

An interrupted run continues from the outcomes in ``--out``. Each class gets LoRA on all linear layers (on its
convolutions if it has none). Its state dict and its adapter directory are saved, and the directory is loaded onto the
bare model. A refusal with a reason is counted separately; any other exception is a failure.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import lightning_peft as lp
from benchmarks.measure import versions

Outcomes = dict[str, dict[str, str]]  # outcome and detail by class
REFUSALS = (lp.StateError, lp.FormatError, lp.TargetError, lp.InjectionError)
LIMIT = 20  #: CPU seconds for one class
LARGEST = 80_000_000  #: maximum number of parameters of a model
_PROBLEMS = ("refused", "failed", "too slow")
_LAYERS = ("layers", "layer", "blocks", "depth", "depths", "repeats")
_WIDTHS = ("hidden", "dim", "width", "d_model", "d_ff", "ffn", "embd", "inner", "channels", "features", "intermediate")
_KEPT = ("vocab", "image", "patch", "kernel", "window", "stride", "label", "rope", "factor", "num_channels", "_in_")


def small(config: Any, width: int) -> Any:
    """A copy of a configuration with one layer of each kind, a small vocabulary and widths divided by ``width``."""
    config = copy.deepcopy(config)
    _shrink(config, width)
    return config


def _shrink(config: Any, width: int) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _shrink(value, width)
        elif name == "vocab_size" and isinstance(value, int):
            vars(config)[name] = min(value, 600)
        elif name.endswith("token_id") and isinstance(value, int) and value >= 600:
            vars(config)[name] = 1
        elif any(name.endswith(end) for end in _LAYERS) and not name.startswith("output"):
            vars(config)[name] = _replaced(value, lambda n: min(n, 2))
        elif any(word in name for word in _WIDTHS) and not any(word in name for word in _KEPT):
            vars(config)[name] = _replaced(value, lambda n: n // width if n % width == 0 and n >= 32 else n)


def _replaced(value: Any, change: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return change(value)
    return type(value)(_replaced(v, change) for v in value) if isinstance(value, list | tuple) else value


def classes() -> Iterator[tuple[type, type]]:
    """Configurations and the base classes that transformers builds from them."""
    seen = set()
    for config in MODEL_MAPPING:
        try:
            found = MODEL_MAPPING[config]
        # a class that this release names but does not have, or that needs a missing library
        except (ValueError, ImportError):
            continue
        for cls in found if isinstance(found, tuple) else (found,):
            if cls not in seen:
                seen.add(cls)
                yield config, cls


def build(config_class: type, cls: Any) -> nn.Module:
    """A small model of ``cls``.

    Raises:
        _NotBuiltError: no configuration that was tried builds one.
    """
    why = ""
    for width in (8, 4, 2, 1, 0):
        try:
            config = small(config_class(), width) if width else config_class()
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if size <= LARGEST:
                return cls(config)
            why = f"has over {LARGEST // 10**6} million parameters"
        except TimeoutError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    raise _NotBuiltError(why)


class _NotBuiltError(Exception):
    pass


def exchange(model: nn.Module) -> str:
    """Adapt, save, unload and load ``model``. Returns the format that the adapter was saved in."""
    model.eval()
    try:
        lp.apply(model, lp.LoRA(r=2))
    except lp.TargetError:  # no linear layer
        kinds = {type(module).__name__ for module in model.modules()} & {"Conv1d", "Conv2d", "Conv3d"}
        lp.apply(model, lp.LoRA(r=2, targets=[f"type:{kind}" for kind in sorted(kinds)]))
    with torch.no_grad():
        for parameter in lp.trainable_parameters(model):
            parameter.normal_()
    before = {key: value.clone() for key, value in lp.adapter_state(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        lp.save_adapter(model, folder)
        lp.unload(model)
        lp.load_adapter(model, folder, trainable=True)
        kind = json.loads((Path(folder) / "adapter_config.json").read_text())
    after = lp.adapter_state(model)
    wrong = [key for key, value in before.items() if key not in after or not torch.equal(after[key], value)]
    # PEFT adapts both projections of nn.MultiheadAttention, so a file has zeros for one that was not adapted.
    wrong += [key for key in after.keys() - before.keys() if key.endswith("lora_B") and after[key].any()]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(before)} tensors differ, first {wrong[:1]}")
    return "own form: " + kind["reason"] if kind["peft_type"] == "LIGHTNING_PEFT" else kind["peft_type"]


def outcome(config_class: type, cls: Any) -> dict[str, str]:
    """The outcome for one class."""
    try:
        with limited(LIMIT):
            return {"outcome": "ok", "detail": exchange(build(config_class, cls))}
    except _NotBuiltError as error:
        return {"outcome": "not built", "detail": str(error)}
    except TimeoutError:
        return {"outcome": "too slow", "detail": f"takes more than {LIMIT} CPU seconds"}
    except REFUSALS as error:
        return {"outcome": "refused", "detail": f"{type(error).__name__}: {error}"}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {"outcome": "failed", "detail": f"{type(error).__name__} at {place}: {error}"}


def markdown(found: Outcomes) -> str:
    """The page for ``benchmarks/results``: the numbers, and the classes whose outcome is not ``ok``."""
    names: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for name, result in sorted(found.items()):
        detail = " ".join(result.get("detail", "").split())
        if result["outcome"] == "ok" and not detail.startswith("own form"):
            detail = "saved as PEFT's"
        # Classes with the same reason share a line, whatever names of modules and models it contains.
        reason = re.sub(r"( but it was not found)? in your environment.*", "", detail)
        reason = re.sub(r"'[\w.]*\.[\w.]*'|\b\w+(?= as an expert)", "...", reason)
        names[result["outcome"], reason[:150]].append(name)
    numbers = collections.Counter(result["outcome"] for result in found.values())
    built = sum(numbers[outcome] for outcome in ("ok", *_PROBLEMS))
    lines = [
        "# Base classes of transformers",
        "",
        "`python -m benchmarks.base_classes --out classes.json --markdown benchmarks/results/base_classes.md`",
        "",
        ", ".join(f"{package} {version}" for package, version in versions().items()),
        "",
        "A small random model of each class gets LoRA on all linear layers, or on its convolutions if it has none. The",
        "adapter is saved, unloaded, and loaded again; every tensor must be the same.",
        "",
        "| tried | built | ok | refused | failed | too slow |",
        "|---|---|---|---|---|---|",
        f"| {len(found)} | {built} | {' | '.join(str(numbers[each]) for each in ('ok', *_PROBLEMS))} |",
        "",
        "| outcome | reason | classes |",
        "|---|---|---|",
    ]
    for (outcome, reason), members in sorted(names.items(), key=lambda item: (item[0][0], -len(item[1]))):
        listed = str(len(members)) if outcome == "ok" and reason == "saved as PEFT's" else ", ".join(members)
        lines.append(f"| {outcome} | {reason.replace('|', '/')} | {listed} |")
    return "\n".join(lines) + "\n"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in the body after ``seconds`` of CPU time."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main() -> None:
    """Try all classes, or those whose names are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes to test; default: all")
    parser.add_argument("--out", type=Path, help="write the outcome of each class to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the page of the outcomes to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: Outcomes = {}
    if arguments.out and arguments.out.exists():
        found = json.loads(arguments.out.read_text())
    chosen = [pair for pair in classes() if not arguments.names or pair[1].__name__ in arguments.names]
    random.Random(0).shuffle(chosen)  # in random order, so that an interrupted run has tried classes of every kind
    for config_class, cls in chosen:
        if cls.__name__ in found:
            continue
        found[cls.__name__] = result = outcome(config_class, cls)
        print(f"{cls.__name__:45} {result['outcome']:10} {result.get('detail', '')[:160]}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))
    print(dict(collections.Counter(result["outcome"] for result in found.values())))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found))


if __name__ == "__main__":
    main()
