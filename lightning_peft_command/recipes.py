"""``lightning-peft recipes``: list the example configurations that the package contains, or copy one."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft_command import package

__all__ = ["recipes"]


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
    options = parser.parse_args(args)
    folder = package() / "recipes"
    known = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    if options.command is None:
        _list(known)
    else:
        _copy(known, options.name, options.dest)


def _list(known: Mapping[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "model", "method", "measured")
    table.columns[0].no_wrap = True
    for name in sorted(known, key=lambda name: (name.count("/"), name != "quickstart", name)):
        table.add_row(name, *_describe(known[name]))
    Console().print(table)
    print("lightning-peft recipes copy NAME writes recipes/NAME.yaml")


def _describe(path: Path) -> tuple[str, str, str]:
    """The model, the methods and the measured figures of a recipe."""
    import yaml

    text = path.read_text()
    config: dict[str, Any] = yaml.safe_load(text)
    model = config["model"]["init_args"].get("model") or config["model"]["class_path"].rpartition(".")[2]
    method = config.get("method") or []
    names = [m if isinstance(m, str) else m["class_path"] for m in (method if isinstance(method, list) else [method])]
    header = " ".join(line[1:].strip() for line in re.findall(r"^#.*$", text.partition("\n\n")[0], re.MULTILINE))
    measured = re.search(r"Measured (.*?)\.(?: |$)", header)
    return str(model).rpartition("/")[2], " + ".join(names), measured[1] if measured else ""


def _copy(known: Mapping[str, Path], name: str, dest: Path | None) -> None:
    name = name.removeprefix("recipes/").removesuffix(".yaml")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
        sys.exit(f"error: no recipe named {name!r}; nearest: {', '.join(near)}")
    dest = dest or Path("recipes", f"{name}.yaml")
    if dest.is_dir():
        dest = dest / known[name].name
    if dest.exists():
        sys.exit(f"error: {dest} exists: give another path, as in lightning-peft recipes copy {name} my.yaml")
    dest.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(known[name], dest)
    print(f"lightning-peft fit --config {dest}")
