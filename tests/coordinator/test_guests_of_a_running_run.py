"""The operator of a running run says who may be in it: by a file, or at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distro_optim.errors import ConfigurationError
from distro_optim.serve.guests import GuestList, read_allow_list

A, B = bytes(range(32)), bytes(range(1, 33))


def write(path: Path, text: str, at: int) -> None:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(at, at))


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "guests.txt"
    write(path, A.hex(), 1)
    return path


def guests(*entries: str) -> GuestList:
    return GuestList(entries, read_allow_list(entries))


def test_a_file_counts_anew_once_it_was_found_the_same_twice(listed: Path) -> None:
    found = guests(str(listed))
    assert found.keys == frozenset({A})
    assert not found.has_changed()
    write(listed, "", 2)  # an editor has begun to write
    assert not found.has_changed()
    write(listed, f"{A.hex()}\n{B.hex()}  # a friend", 3)
    assert not found.has_changed()
    assert found.has_changed()
    assert found.keys == frozenset({A, B})
    assert not found.has_changed()


def test_what_says_the_same_is_no_change(listed: Path) -> None:
    found = guests(str(listed))
    write(listed, f"# friends\n{A.hex()}", 2)
    assert not any(found.has_changed() for _ in range(3))


@pytest.mark.parametrize("spoils", [lambda path: path.unlink(), lambda path: path.write_text("no key")])
def test_a_file_that_is_no_list_any_more_is_told_once_and_the_list_from_before_counts(
    listed: Path, spoils: object
) -> None:
    found = guests(str(listed), B.hex())
    assert callable(spoils)
    spoils(listed)
    assert not found.has_changed()
    with pytest.raises(ConfigurationError):
        found.has_changed()
    assert not any(found.has_changed() for _ in range(3))
    assert found.keys == frozenset({A, B})


def test_without_entries_everybody_may_come() -> None:
    found = guests()
    assert found.keys is None
    assert not found.has_changed()
