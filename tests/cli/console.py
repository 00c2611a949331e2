"""Run the command line in the test's own process."""

from __future__ import annotations

import contextlib
import io

from lightning_peft_command import main


def run(*args: str) -> str:
    """Return what ``lightning-peft`` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(list(args))
    return out.getvalue()
