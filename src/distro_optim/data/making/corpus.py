"""The texts of a folder, in an order that is the same each time, piece by piece.

A file is a text. Files with a NUL in their first kilobytes (as git has it) and empty ones are not texts. Those whose
names begin with a dot, or whose folders' do, are left out. Links are not followed.

A text longer than :data:`PIECE_BYTES` is given in pieces, each cut behind its last line end, so that memory does not
grow with the texts. Where a piece ends depends on the text alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ...errors import ConfigurationError

__all__ = ["Corpus", "CorpusFile", "Piece"]

PIECE_BYTES: Final = 256 * 1024
"""Longest piece of text. Tokenizers take about a hundred times as much memory while they work."""

LOOKED_AT: Final = 8000
"""Bytes in which a NUL tells that a file is not text, as in git (``buffer_is_binary`` in its ``xdiff-interface.c``)."""

_CONTINUATION: Final = range(0x80, 0xC0)
"""Bytes inside a character of UTF-8."""


@dataclass(frozen=True)
class CorpusFile:
    """A text.

    Attributes:
        name: path from the folder, with ``/``.
        size: bytes.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Piece:
    """Part of a text.

    Attributes:
        file: the name of the file it is of.
        text: its bytes.
        start: where it begins in the file.
        is_last: whether the text ends with it.
    """

    file: str
    text: bytes
    start: int
    is_last: bool


class Corpus:
    """The texts of a folder. Looks at every file once when it is made.

    Args:
        folder: where they are.
        include: patterns of names as the shell has them, such as ``*.py``; one of them must fit. All files if empty.
        exclude: files that are none of the texts, such as the output.

    Attributes:
        num_files: texts.
        num_skipped: files that are not text.
        num_bytes: of all texts.
        digest: SHA-256 over names, sizes and times of change of all texts, in hexadecimal.

    Raises:
        ConfigurationError: the folder or a file cannot be read, or there is no text.
    """

    def __init__(
        self, folder: str | os.PathLike[str], include: Sequence[str] = (), *, exclude: Collection[Path] = ()
    ) -> None:
        self.folder = Path(folder)
        self._include = tuple(include)
        self._exclude = frozenset(path.absolute() for path in exclude)
        self.num_files = self.num_skipped = self.num_bytes = 0
        hashed = hashlib.sha256()
        if not self.folder.is_dir():
            raise ConfigurationError(f"{folder} is not a folder with texts", name="folder", value=folder)
        for path, name, status in self._walk(self.folder, ""):
            if not _is_text(path):
                self.num_skipped += 1
                continue
            self.num_files += 1
            self.num_bytes += status.st_size
            hashed.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        self.digest = hashed.hexdigest()
        if not self.num_files:
            wanted = f" called {' or '.join(self._include)}" if self._include else ""
            raise ConfigurationError(f"{folder} has no text files{wanted}", name="folder", value=folder)

    def files(self) -> Iterator[CorpusFile]:
        """All texts in order."""
        for path, name, status in self._walk(self.folder, ""):
            if _is_text(path):
                yield CorpusFile(name, status.st_size)

    def pieces(self, after: str | None = None, offset: int | None = None) -> Iterator[Piece]:
        """All pieces in order.

        Args:
            after: the text to go on with; all if left out.
            offset: the byte of it to begin with, where a piece begins; None goes on behind it.

        Raises:
            ConfigurationError: a text cannot be read or is not there.
        """
        found = after is None
        for one in self.files():
            if found:
                yield from _pieces(self.folder / one.name, one.name, 0)
            elif one.name == after:
                found = True
                if offset is not None:
                    yield from _pieces(self.folder / one.name, one.name, offset)
        if not found:
            raise ConfigurationError(f"{after} is not in {self.folder} any more", name="folder")

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[Path, str, os.stat_result]]:
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigurationError(f"cannot read {folder}: {error.strerror or error}", name="folder") from None
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            path, name = folder / entry.name, prefix + entry.name
            if entry.is_dir():
                yield from self._walk(path, name + "/")
            elif entry.is_file() and self._is_wanted(entry.name) and path.absolute() not in self._exclude:
                yield path, name, entry.stat()

    def _is_wanted(self, name: str) -> bool:
        return not self._include or any(fnmatchcase(name, pattern) for pattern in self._include)


def _is_text(path: Path) -> bool:
    start = _read(path, 0, LOOKED_AT)
    return bool(start) and b"\0" not in start


def _pieces(path: Path, name: str, offset: int) -> Iterator[Piece]:
    while True:
        # One byte more tells whether the text goes on.
        data = _read(path, offset, PIECE_BYTES + 1)
        if len(data) <= PIECE_BYTES:
            yield Piece(name, data, offset, True)
            return
        end = _cut(data[:PIECE_BYTES])
        yield Piece(name, data[:end], offset, False)
        offset += end


def _cut(data: bytes) -> int:
    """Where to end a piece: behind the last line end, or else before a character that may not be whole."""
    end = data.rfind(b"\n") + 1
    if end:
        return end
    end = len(data)
    while end > len(data) - 4 and data[end - 1] in _CONTINUATION:
        end -= 1
    return end - 1 if data[end - 1] >= 0xC0 and end > 1 else len(data)


def _read(path: Path, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}", name="folder", value=path) from None
