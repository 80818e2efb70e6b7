"""Downloads on disk: what has arrived of a blob, kept across a restart and proven again before it counts."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Final

from typing_extensions import override

from .outboard import MutableBuffer, outboard_len
from .prefix import restored_prefix
from .store import PartialBlob
from .tree import Buffer

__all__ = ["DiskPartial", "has_length", "remove_files"]

_WRITE_BUFFER: Final = 1024 * 1024


class DiskPartial(PartialBlob):
    """A download in a directory. The outboard is mapped, so what is proven reaches its file without further ado.

    Args:
        directory: where ``<hash>.data`` and ``<hash>.<size>.pairs`` are, or will be.
        root: the blob's hash.
        durable: whether :meth:`seal` waits for the disk.
        take: asks the store for room in bytes; raises StoreFullError.
        give_back: returns all room taken for this download, now and earlier.
        on_close: called when the download ends.
    """

    def __init__(
        self,
        directory: Path,
        root: bytes,
        *,
        durable: bool,
        take: Callable[[int], None],
        give_back: Callable[[], None],
        on_close: Callable[[], None],
    ) -> None:
        self.root = root
        self.prefix = None
        self.data_path = directory / f"{root.hex()}.data"
        self._directory = directory
        self._durable = durable
        self._take = take
        self._give_back = give_back
        self._on_close = on_close
        self._outboard: mmap.mmap | None = None
        self._file: IO[bytes] | None = None
        self._continue()

    def pairs_path(self, size: int) -> Path:
        """Where the hash pairs of a blob of ``size`` bytes are kept until it is complete."""
        return self._directory / f"{self.root.hex()}.{size}.pairs"

    @override
    def new_outboard(self, size: int) -> MutableBuffer:
        length = outboard_len(size)
        self._take(length)
        if length == 0:
            return bytearray()
        path = self.pairs_path(size)
        # Zeros are written, not seeked over: writing to a mapped hole on a full disk would kill the process.
        with path.open("wb") as file:
            for at in range(0, length, _WRITE_BUFFER):
                file.write(bytes(min(length - at, _WRITE_BUFFER)))
        return self._map_outboard(path)

    @override
    def append(self, data: Buffer) -> None:
        self._take(len(data))
        if self._file is None:
            self._file = self.data_path.open("ab", buffering=_WRITE_BUFFER)
        self._file.write(data)

    @override
    def restart(self) -> None:
        self._close_files()
        remove_files(self._directory.glob(f"{self.root.hex()}.*"))
        self._give_back()
        self.prefix = None

    @override
    def close(self) -> None:
        self._close_files()
        self._on_close()

    def seal(self) -> None:
        """Brings everything to the disk and closes the files, before they are renamed."""
        if self._file is None:
            self.data_path.touch()  # the empty blob
        elif self._durable:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._outboard is not None and self._durable:
            self._outboard.flush()
        self._close_files()

    def _continue(self) -> None:
        """Takes up what an earlier download left, as far as it can be proven."""
        found = list(self._directory.glob(f"{self.root.hex()}.*.pairs"))
        size = int(found[0].name.split(".")[1]) if len(found) == 1 and found[0].name.split(".")[1].isdecimal() else 0
        if not (size and has_length(found[0], outboard_len(size)) and self.data_path.exists()):
            self.restart()
            return
        outboard = self._map_outboard(found[0])
        stored = self.data_path.stat().st_size
        with self.data_path.open("rb") as file:
            self.prefix = restored_prefix(self.root, size, outboard, stored, lambda at, n: _read_at(file, at, n))
        if self.prefix.length == 0:
            self.restart()
        elif stored > self.prefix.length:
            os.truncate(self.data_path, self.prefix.length)
            self._give_back()
            self._take(len(outboard) + self.prefix.length)

    def _map_outboard(self, path: Path) -> mmap.mmap:
        with path.open("r+b") as file:
            self._outboard = mmap.mmap(file.fileno(), 0)
        return self._outboard

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._outboard is not None:
            self._outboard.close()
            self._outboard = None


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def has_length(path: Path, length: int) -> bool:
    """Whether the file has so many bytes; a missing one has none."""
    try:
        return path.stat().st_size == length
    except FileNotFoundError:
        return length == 0


def remove_files(paths: Iterable[Path]) -> None:
    """Deletes files that may be gone already."""
    for path in list(paths):
        path.unlink(missing_ok=True)
