"""Registries: names, aliases, suggestions, lazy entries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepladder.core.errors import UserError
from stepladder.core.registry import Registry, did_you_mean


@pytest.fixture
def table() -> Registry[str]:
    table: Registry[str] = Registry("task")
    table.add("parity", "P", aliases=("xor",))
    table.add("addition", "A")
    return table


def test_names_and_aliases(table: Registry[str]) -> None:
    assert table.get("parity") == table.get("xor") == "P"
    assert table.name("xor") == "parity"
    assert table.names() == ["addition", "parity"]


def test_a_wrong_name_gets_the_nearest_or_all(table: Registry[str]) -> None:
    with pytest.raises(UserError, match=r"^unknown task 'partiy' — did you mean 'parity'\?$"):
        table.get("partiy")
    with pytest.raises(UserError, match=r"^unknown task 'zzz'; known: addition, parity$"):
        table.name("zzz")


@pytest.mark.parametrize(("name", "aliases"), [("parity", ()), ("xor", ()), ("new", ("parity",)), ("new", ("xor",))])
def test_a_taken_name_is_refused_and_nothing_changes(table: Registry[str], name: str, aliases: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="is already taken"):
        table.add(name, "other", aliases)
    assert table.names() == ["addition", "parity"]
    assert table.get("xor") == "P"


def test_the_same_thing_may_come_twice(table: Registry[str]) -> None:
    thing = table.get("parity")
    assert table.add("parity", thing, aliases=("xor",)) is thing


def test_lazy_entries_load_when_asked_for(
    table: Registry[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_target_module.py").write_text("thing = 'T'\n")
    (tmp_path / "lazy_broken_module.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    table.lazy("late", "lazy_target_module:thing", extra="hf")
    table.lazy("broken", "lazy_broken_module:thing", extra="clrs")
    assert table.names() == ["addition", "broken", "late", "parity"]
    assert "lazy_target_module" not in sys.modules
    assert table.get("late") == "T"
    expected = r"^task 'broken' needs 'no_such_package_anywhere': pip install 'stepladder\[clrs\]'$"
    with pytest.raises(UserError, match=expected):
        table.get("broken")


def test_did_you_mean() -> None:
    assert did_you_mean("widht", ["width", "depth"]) == " — did you mean 'width'?"
    assert did_you_mean("zzz", ["width", "depth"]) == ""
    assert did_you_mean("x", []) == ""
