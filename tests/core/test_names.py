"""Test joining, splitting and listing qualified names."""

from __future__ import annotations

import pytest

from lightning_peft.core.names import (
    adapter_key,
    around_all,
    host_of,
    is_adapter_key,
    is_within,
    join,
    leaf,
    nearest,
    owner_of,
    parents,
    relative,
)


def test_names_are_joined_and_split():
    assert join("", "a", "", "b.c") == "a.b.c"
    assert (owner_of("a.b.c"), leaf("a.b.c"), owner_of("a"), leaf("a")) == ("a.b", "c", "", "a")
    assert parents("a.b.c") == ["", "a", "a.b"]
    assert parents("a") == [""]
    assert parents("") == []


def test_is_within_compares_whole_parts():
    assert is_within("a.b", "a")
    assert is_within("a", "a")
    assert is_within("a", "")
    assert is_within("a.b", "x", "a")
    assert not is_within("ab.c", "a")
    assert not is_within("a", "a.b")
    assert not is_within("a")
    assert (relative("a.b.c", "a"), relative("a", "a"), relative("a.b", "")) == ("b.c", "", "a.b")
    with pytest.raises(ValueError, match="is not inside"):
        relative("ab.c", "a")
    assert around_all(["a.b.c", "a.b.d"]) == ["", "a", "a.b"]
    assert around_all(["a.b", "a"]) == ["", "a"]
    assert around_all([]) == around_all(["", "a"]) == [""]


def test_keys_of_adapters():
    key = adapter_key("a.b", "default", "lora_A")
    assert key == "a.b.adapters.default.lora_A"
    assert host_of(key) == "a.b"
    assert host_of(adapter_key("", "default", "lora_A")) == ""
    assert host_of("a.weight") == "a.weight"
    assert is_adapter_key(key)
    assert is_adapter_key(key, "default")
    assert not is_adapter_key(key, "def")
    assert not is_adapter_key("a.my_adapters.default.x")


def test_nearest():
    assert nearest("q_prj", ["q_proj", "k_proj", "mlp"]) == ["q_proj"]
