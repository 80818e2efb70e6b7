"""Blobs in a directory, whole at every moment: a kill, or a power cut, loses only what was not finished.

::

    version                    "distro_optim blobs 1"
    lock                       held by the process that has the store open
    blobs/ab/<hash>.data       a complete blob; <hash> is 64 hex digits and begins with "ab"
    blobs/ab/<hash>.pairs      its outboard; missing if empty. Comes before, and goes after, the data
    partial/<hash>.data        the beginning of a download
    partial/<hash>.<size>.pairs  the outboard that goes with it, as far as it is proven
    tags/<name>                percent-encoded; holds the hash in hex and a newline
    tmp/                       files being written; emptied when the store is opened

Files appear under their names by rename only and never change afterwards, except those in ``partial/``: they are
proven again when a download continues.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote, unquote

from typing_extensions import override

from ....errors import ConfigurationError, ExchangeError, StoreFullError
from .disk_partial import DiskPartial, has_length, remove_files
from .outboard import build_outboard, outboard_len
from .store import KEEP_CUT_SECONDS, Blob, BlobStore, PartialBlob, check_tag, require_proven
from .tree import HASH_LEN, Buffer

__all__ = ["DiskStore"]

_VERSION: Final = "distro_optim blobs 1\n"


class DiskStore(BlobStore):
    """Blobs in a directory of one process.

    Args:
        path: the directory; made if it is not there.
        max_bytes: limit for everything the store holds; None for no limit. What is there already may exceed it.
        keep_cut_seconds: how long a download that was cut may wait to go on, counted again when the store is opened.
        durable: whether to wait until the disk has what was written (fsync). Without, a power cut may lose blobs.

    Raises:
        ConfigurationError: the directory belongs to something else, to a later version or to another process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        keep_cut_seconds: float = KEEP_CUT_SECONDS,
        durable: bool = True,
    ) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._keep_cut_seconds = keep_cut_seconds
        self._durable = durable
        self._lock = threading.RLock()
        self._serial = count()
        self._blobs: dict[bytes, int] = {}
        self._tags: dict[str, bytes] = {}
        self._open: set[bytes] = set()
        self._partial_used: dict[bytes, int] = {}
        self._cut_at: dict[bytes, float] = {}
        self._used = 0
        for name in ("blobs", "partial", "tags", "tmp"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock_directory(self.path)
        try:
            self._check_version()
            self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes have the directory. Blobs that are held stay readable."""
        self._lock_file.close()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @override
    def used_bytes(self) -> int:
        return self._used

    @override
    def add(self, data: Buffer, *, tag: str | None = None) -> bytes:
        if tag is not None:
            check_tag(tag)
        root, outboard = build_outboard(data)
        with self._lock:
            if root not in self._blobs:
                self._reserve(len(data) + len(outboard))
                try:
                    if outboard:
                        self._write(self._blob_path(root, "pairs"), [outboard])
                    self._write(self._blob_path(root, "data"), [data])
                except BaseException:
                    self._used -= len(data) + len(outboard)
                    raise
                self._blobs[root] = len(data)
            if tag is not None:
                self.set_tag(tag, root)
        return root

    @override
    def get(self, root: bytes) -> Blob | None:
        if root not in self._blobs:
            return None
        try:
            data = _map(self._blob_path(root, "data"))
            outboard = _map(self._blob_path(root, "pairs")) if outboard_len(len(data)) else b""
        except OSError:
            # Collected meanwhile, or taken away behind our back.
            return None
        return Blob(data, outboard)

    @override
    def begin(self, root: bytes) -> PartialBlob:
        with self._lock:
            if root in self._open:
                raise ExchangeError(f"blob {root.hex()} is being fetched already")
            self._open.add(root)
        try:
            return DiskPartial(
                self.path / "partial",
                root,
                durable=self._durable,
                take=lambda length: self._take(root, length),
                give_back=lambda: self._give_back(root),
                on_close=lambda: self._end(root),
            )
        except BaseException:
            self._end(root)
            raise

    @override
    def complete(self, partial: PartialBlob, *, tag: str | None = None) -> None:
        if not isinstance(partial, DiskPartial):
            raise ConfigurationError("this download was begun in another store", name="partial")
        if tag is not None:
            check_tag(tag)
        size = require_proven(partial).size
        with self._lock:
            partial.seal()
            if partial.root in self._blobs:
                partial.restart()
            else:
                if outboard_len(size):
                    self._rename(partial.pairs_path(size), self._blob_path(partial.root, "pairs"))
                self._rename(partial.data_path, self._blob_path(partial.root, "data"))
                self._blobs[partial.root] = size
                self._partial_used.pop(partial.root, None)
            if tag is not None:
                self.set_tag(tag, partial.root)

    @override
    def tags(self) -> Mapping[str, bytes]:
        with self._lock:
            return dict(self._tags)

    @override
    def set_tag(self, name: str, root: bytes) -> None:
        check_tag(name)
        if len(root) != HASH_LEN:
            raise ConfigurationError(f"a hash has {HASH_LEN} bytes, got {len(root)}", name="root", value=root)
        with self._lock:
            if self._tags.get(name) != root:
                self._write(self._tag_path(name), [root.hex().encode() + b"\n"])
                self._tags[name] = root

    @override
    def delete_tags(self, unwanted: Callable[[str], bool]) -> int:
        with self._lock:
            names = [name for name in self._tags if unwanted(name)]
            for name in names:
                self._tag_path(name).unlink(missing_ok=True)
                del self._tags[name]
        return len(names)

    @override
    def collect_garbage(self) -> int:
        return self._collect(time.monotonic() - self._keep_cut_seconds)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _collect(self, cut_before: float) -> int:
        with self._lock:
            before = self._used
            named = set(self._tags.values())
            for root in [root for root in self._blobs if root not in named]:
                size = self._blobs[root]
                try:
                    # Data first: without it, pairs are swept away when the store is opened.
                    self._blob_path(root, "data").unlink(missing_ok=True)
                    self._blob_path(root, "pairs").unlink(missing_ok=True)
                except PermissionError:
                    continue  # Windows: somebody is reading it; the next collection will get it
                del self._blobs[root]
                self._used -= size + outboard_len(size)
            waiting = [root for root in self._partial_used if root not in self._open]
            for root in waiting:
                if self._cut_at.get(root, -math.inf) <= cut_before:
                    remove_files(self.path.glob(f"partial/{root.hex()}.*"))
                    self._used -= self._partial_used.pop(root)
                    self._cut_at.pop(root, None)
            return before - self._used

    def _blob_path(self, root: bytes, suffix: str) -> Path:
        name = root.hex()
        return self.path / "blobs" / name[:2] / f"{name}.{suffix}"

    def _tag_path(self, name: str) -> Path:
        # "." and ".." survive percent-encoding, so every dot is encoded as well.
        return self.path / "tags" / quote(name, safe="").replace(".", "%2E")

    def _write(self, path: Path, pieces: Iterable[Buffer]) -> None:
        """Makes a file appear whole or not at all."""
        temporary = self.path / "tmp" / str(next(self._serial))
        with temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            if self._durable:
                file.flush()
                os.fsync(file.fileno())
        self._rename(temporary, path)

    def _rename(self, source: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        os.replace(source, target)
        if self._durable and os.name == "posix":
            directory = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _check_version(self) -> None:
        path = self.path / "version"
        try:
            found = path.read_text()
        except FileNotFoundError:
            self._write(path, [_VERSION.encode()])
            return
        if found != _VERSION:
            raise ConfigurationError(
                f"{self.path} holds {found.strip()[:40]!r}, not {_VERSION.strip()!r}; use another directory",
                name="path",
                value=str(self.path),
            )

    def _recover(self) -> None:
        """Sweeps away what a kill left behind and takes stock of the rest."""
        remove_files((self.path / "tmp").iterdir())
        for path in self.path.glob("blobs/*/*.data"):
            root, size = _parse_hash(path.stem), path.stat().st_size
            if root is not None and has_length(path.with_suffix(".pairs"), outboard_len(size)):
                self._blobs[root] = size
                self._used += size + outboard_len(size)
            else:
                path.unlink()
        for path in self.path.glob("blobs/*/*.pairs"):
            root = _parse_hash(path.stem)
            if root is None or root not in self._blobs:
                path.unlink()
        for path in self.path.glob("partial/*"):
            root = _parse_hash(path.name.partition(".")[0])
            if root is None or root in self._blobs:
                path.unlink()
            else:
                length = path.stat().st_size
                self._partial_used[root] = self._partial_used.get(root, 0) + length
                self._cut_at[root] = time.monotonic()
                self._used += length
        for path in self.path.glob("tags/*"):
            root = _parse_hash(path.read_text(errors="replace").strip())
            if root is None:
                path.unlink()
            else:
                self._tags[unquote(path.name)] = root

    def _reserve(self, length: int) -> None:
        with self._lock:
            if self.max_bytes is not None and self._used + length > self.max_bytes:
                self._collect(cut_before=math.inf)
                if self._used + length > self.max_bytes:
                    raise StoreFullError(
                        f"{length} bytes do not fit: {self._used} of {self.max_bytes} are in use by tagged blobs and "
                        "downloads; delete tags or raise max_bytes"
                    )
            self._used += length

    def _take(self, root: bytes, length: int) -> None:
        with self._lock:
            self._reserve(length)
            self._partial_used[root] = self._partial_used.get(root, 0) + length

    def _end(self, root: bytes) -> None:
        with self._lock:
            self._open.discard(root)
            if root in self._partial_used:
                self._cut_at[root] = time.monotonic()
            else:
                self._cut_at.pop(root, None)

    def _give_back(self, root: bytes) -> None:
        with self._lock:
            self._used -= self._partial_used.pop(root, 0)


def _map(path: Path) -> Buffer | mmap.mmap:
    """The file's content, mapped: only what is read takes memory, and it outlives the file's name."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _parse_hash(text: str) -> bytes | None:
    try:
        root = bytes.fromhex(text)
    except ValueError:
        return None
    return root if len(root) == HASH_LEN and root.hex() == text else None


def _lock_directory(path: Path) -> IO[bytes]:
    """An open file whose lock goes with the process, however it ends."""
    file = (path / "lock").open("ab")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigurationError(
            f"{path} is in use by another process; give each its own directory", name="path", value=str(path)
        ) from None
    return file
