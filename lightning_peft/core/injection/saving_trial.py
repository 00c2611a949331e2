"""Check before training that an adapter can be saved in every format; the formats register their checks here."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_peft.core.record import injection_state

__all__ = ["saving_problem", "saving_trials"]

#: functions of an adapted module and an adapter name. They run the code for saving without copies or files, raise the
#: same errors, and may return a note for the user.
saving_trials: list[Callable[[nn.Module, str], str | None]] = []


def saving_problem(model: nn.Module, name: str) -> tuple[str | None, list[str]]:
    """Return why the adapter ``name`` could not be saved (None if it can be), and notes for the user."""
    record, notes = injection_state(model), []
    kind = type(record.methods[name]).__name__ if record is not None else ""
    for trial in saving_trials:
        try:
            notes.append(trial(model, name))
        except Exception as error:  # the code of a user's method may raise anything
            what = str(error) if isinstance(error, ValueError | RuntimeError) else repr(error)
            return f"lp.save_adapter could not save {kind} {name!r} after training: {what}", []
    return None, [f"{kind} {name!r}: {note}" for note in notes if note]
