"""Read ``recipes/methods.yaml``, the settings of every method on the command line."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lightning_peft_command import package

__all__ = ["Settings", "command_name", "read_settings"]


class Settings(NamedTuple):
    """A section of ``recipes/methods.yaml``.

    Fields:
        about: its comment lines.
        lr: the learning rate for the demo model.
        comment: the comment on the learning rate, with its padding.
        model: further lines of the module's arguments that the demo model needs.
        method: the lines under and including ``method:``.
        text: the whole section.
    """

    about: str
    lr: float
    comment: str
    model: str
    method: str
    text: str


def command_name(class_name: str) -> str:
    """The name of a method on the command line: ``PrefixTuning`` is ``prefix-tuning``, ``AdaLoRA`` is ``adalora``."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z]{3})|(?<=[a-z]{4})(?=[A-Z])", "-", class_name).lower()


def read_settings() -> dict[str, Settings]:
    """The sections of ``recipes/methods.yaml`` by name: the methods' command-line names, and hybrids."""
    parts = re.split(r"^--- # (.+)\n", (package() / "recipes" / "methods.yaml").read_text(), flags=re.MULTILINE)
    return {name: _settings(text.strip() + "\n") for name, text in zip(parts[1::2], parts[2::2])}


def _settings(text: str) -> Settings:
    found = re.fullmatch(
        r"(?P<about>(?:#.*\n)+)model:\n  init_args:\n    lr: (?P<lr>\S+)(?P<comment>.*)\n(?P<model>(?:    .*\n)*)"
        r"(?P<method>method:.*\n(?:  .*\n)*)",
        text,
    )
    assert found is not None, text
    fields: dict[str, Any] = {**found.groupdict(), "lr": float(found["lr"])}
    return Settings(**fields, text=text)
