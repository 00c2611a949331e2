"""``lightning-peft recipes``: list the example configurations that the package contains, or copy one.

A copy can have another method than the recipe: ``recipes/methods.yaml`` has settings for each.
"""

from __future__ import annotations

import difflib
import re
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft_command import package
from lightning_peft_command.settings import Settings, command_name, read_settings

__all__ = ["recipes"]

#: learning rate of LoRA for the demo model, for which the rates of ``recipes/methods.yaml`` are given
LORA_LR = 2e-3


def recipes(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``recipes``: nothing, or ``copy``, a name and a path.
    """
    parser = ArgumentParser(prog="lightning-peft recipes", description="List the example configurations, or copy one.")
    commands = parser.add_subparsers(dest="command", metavar="copy")
    copy = commands.add_parser("copy", help="copy a recipe, to change it and run it")
    copy.add_argument("name", help="such as quickstart or text-classification/minilm_lora")
    copy.add_argument("dest", nargs="?", type=Path, help="a file or folder; default: recipes/NAME.yaml")
    copy.add_argument("--method", help="replace the recipe's LoRA by another method, such as dora")
    options = parser.parse_args(args)
    folder = package() / "recipes"
    known = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    del known["methods"]
    if options.command is None:
        _list(known)
    else:
        _copy(known, options.name, options.dest, options.method)


def _list(known: Mapping[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "method", "measured")
    table.columns[0].no_wrap = True
    for name in sorted(known, key=lambda name: (name.count("/"), name != "quickstart", name)):
        table.add_row(name, *_describe(known[name]))
    console = Console()
    console.print(table)
    print("lightning-peft recipes copy NAME writes recipes/NAME.yaml")
    methods = ", ".join(read_settings())
    console.print(f"lightning-peft recipes copy NAME --method METHOD replaces LoRA by: {methods}", highlight=False)


def _describe(path: Path) -> tuple[str, str]:
    """The method and the measured result of a recipe."""
    import yaml

    text = path.read_text()
    method: Any = yaml.safe_load(text)["method"]
    header = " ".join(line[1:].strip() for line in re.findall(r"^#.*$", text.partition("\n\n")[0], re.MULTILINE))
    measured = re.search(r"Measured: (.*?)(?:;|\. |$)", header)
    return method if isinstance(method, str) else method["class_path"], measured[1] if measured else ""


def _copy(known: Mapping[str, Path], name: str, dest: Path | None, method: str | None) -> None:
    name = name.removeprefix("recipes/").removesuffix(".yaml")
    settings = read_settings()
    if name not in known:
        if name in settings:
            sys.exit(f"error: {name} is a method: lightning-peft recipes copy quickstart --method {name}")
        sys.exit(f"error: no recipe named {name!r}; nearest: {_near(name, known)}")
    chosen = None if method is None else method.lower() if method.lower() in settings else command_name(method)
    if chosen is not None and chosen not in settings:
        sys.exit(f"error: no method named {method!r}; nearest: {_near(chosen, settings)}")
    new = name if chosen is None else f"{name.removesuffix('_lora')}_{chosen}"
    dest = dest or Path("recipes", f"{new}.yaml")
    if dest.is_dir():
        dest = dest / f"{Path(new).name}.yaml"
    if dest.exists():
        sys.exit(f"error: {dest} exists: give another path, as in lightning-peft recipes copy {name} my.yaml")
    text = known[name].read_text()
    if chosen is not None:
        text = _with_method(name, text, settings[chosen], f"runs/{new.replace('/', '-')}", dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(text)
    print(f"lightning-peft fit --config {dest}")


def _with_method(name: str, text: str, settings: Settings, run: str, dest: Path) -> str:
    """A recipe's text with the learning rate and the method of ``settings``; ``run`` is its output folder."""
    _, _, body = text.partition("\n\n")
    method = re.search(r"^method:\n(?:  .*\n)+", body, re.MULTILINE)
    rate = re.search(r"^    lr: (\S+).*\n", body, re.MULTILINE)
    if method is None or "class_path: LoRA\n" not in method[0] or rate is None:
        sys.exit(
            f"error: {name} does not train LoRA, so its learning rate says nothing about other methods: edit a copy"
        )
    mantissa, exponent = f"{float(rate[1]) * settings.lr / LORA_LR:.1e}".split("e")
    own = settings.model if name == "quickstart" else ""
    body = body.replace(rate[0], f"    lr: {mantissa}e{int(exponent)}{settings.comment}\n{own}")
    body = body.replace(method[0], settings.method)
    body = re.sub(r"^  default_root_dir: \S+", f"  default_root_dir: {run}", body, flags=re.MULTILINE)
    header = f"#\n#   lightning-peft fit --config {dest}\n#\n# Model and data are those of the recipe {name}.\n"
    return f"{settings.about}{header}\n{body}"


def _near(name: str, known: Mapping[str, Any]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known))
