"""Who may join a served run: keys, and files of keys that are read again when they change."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from ..comm.signing import PUBLIC_KEY_SIZE
from ..errors import ConfigurationError

__all__ = ["GuestList", "read_allow_list"]

_HEX_KEY: Final = re.compile(rf"[0-9a-fA-F]{{{2 * PUBLIC_KEY_SIZE}}}")
"""A public key as users write it."""


def read_allow_list(entries: Iterable[str]) -> frozenset[bytes] | None:
    """Public keys from hexadecimal keys and names of files with one a line (``#`` begins a comment).

    Returns:
        None if there are no entries, and everybody may join.

    Raises:
        ConfigurationError: an entry is neither; names it.
    """
    entries = list(entries)
    if not entries:
        return None
    keys: set[bytes] = set()
    for entry in entries:
        if _HEX_KEY.fullmatch(entry):
            keys.add(bytes.fromhex(entry))
            continue
        try:
            lines = Path(entry).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigurationError(
                f"--allow {entry}: neither a key of {2 * PUBLIC_KEY_SIZE} hexadecimal digits nor a file with such keys",
                name="allow",
                value=entry,
            ) from None
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if text and not _HEX_KEY.fullmatch(text):
                raise ConfigurationError(f"{entry}, line {number}: {text!r} is not a key", name="allow", value=text)
            if text:
                keys.add(bytes.fromhex(text))
    return frozenset(keys)


class GuestList:
    """The entries of ``--allow``, and what they said when they were last read.

    Args:
        entries: see :func:`read_allow_list`.
        keys: what that gave.

    Attributes:
        keys: that may join; None lets everybody in.
    """

    def __init__(self, entries: Sequence[str], keys: frozenset[bytes] | None) -> None:
        self.keys = keys
        self._entries = entries
        self._seen = self._last = self._marks()

    def has_changed(self) -> bool:
        """Whether other keys may join than before. Call it often: a file counts when two looks found it the same.

        Raises:
            ConfigurationError: a file is not a list any more; said once for each change.
        """
        marks = self._marks()
        # A file that is being written is not read yet: half of a list would take the others out of the run.
        is_settled, self._last = marks == self._last, marks
        if marks == self._seen or not is_settled:
            return False
        self._seen = marks
        before, self.keys = self.keys, read_allow_list(self._entries)
        return before != self.keys

    def _marks(self) -> list[tuple[int, int, int] | None]:
        return [None if _HEX_KEY.fullmatch(entry) else _mark(entry) for entry in self._entries]


def _mark(path: str) -> tuple[int, int, int] | None:
    """Tells a file from what it was before; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
