"""Checks that a room maps the names of its modules to their rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ddpm.errors import InputError
from ddpm.rooms import Room


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room[int]:
    folder = tmp_path / "a_room"
    folder.mkdir()
    files = {
        "__init__": "",
        "one": "ROW = 1\n",
        "two": "ROW: int = 2\n",
        "rows": 'ROWS = {}\n"""\n  ROW = 3\n"""\nif ROWS == 5:\n    ROW = 4\n',
        "broken": "ROW = 6\nraise RuntimeError('imported')\n",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_room"]:
        monkeypatch.delitem(sys.modules, name)
    return Room("a_room", "some.key", "ROW")


def test_the_rows_are_those_of_the_modules_that_hold_one(room: Room[int]) -> None:
    assert list(room) == ["broken", "one", "two"] and len(room) == 3
    assert room["one"] == room.select("one") == 1
    assert room["two"] == 2
    assert "rows" not in room and "__init__" not in room
    assert room.get("rows") is None


def test_a_file_that_is_added_is_a_row_at_once(room: Room[int], tmp_path: Path) -> None:
    assert "three" not in room
    (tmp_path / "a_room" / "three.py").write_text("ROW = 3\n")
    assert room["three"] == 3


def test_an_unknown_name_is_one_line_that_lists_the_names(room: Room[int]) -> None:
    for look in (room.select, room.require):
        with pytest.raises(InputError) as caught:
            look("four")
        assert str(caught.value) == "some.key: no 'four' in a_room; there are broken, one, two"
    with pytest.raises(KeyError):
        room["four"]


def test_a_row_is_imported_when_it_is_used(room: Room[int]) -> None:
    room.require("broken")
    with pytest.raises(RuntimeError, match="imported"):
        room["broken"]
