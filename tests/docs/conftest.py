"""Examples of one name in several places define methods of one name: none of them outlives its test."""

import pytest

from lightning_peft.core import registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """A copy of the method registry for each test."""
    monkeypatch.setattr(registry, "_METHODS", {name: dict(found) for name, found in registry._METHODS.items()})
