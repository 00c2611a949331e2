"""Examples in several places define methods with the same name, so each test gets a copy of the method registry."""

import pytest

from lightning_peft.core import registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """A copy of the method registry for each test."""
    monkeypatch.setattr(registry, "_METHODS", {name: dict(found) for name, found in registry._METHODS.items()})
