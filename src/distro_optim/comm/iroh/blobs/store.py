"""Where blobs live: what a store promises, and the store in memory.

A blob stays while a tag names it. What no tag names is dropped by garbage collection, and at once when room is needed.
Every store counts data, outboards and unfinished downloads against ``max_bytes`` and never grows beyond it.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Final

from typing_extensions import override

from ....errors import ConfigurationError, ExchangeError, HashMismatchError, StoreFullError
from .outboard import MutableBuffer, build_outboard, outboard_len
from .prefix import PrefixVerifier
from .tree import HASH_LEN, Buffer

__all__ = ["KEEP_CUT_SECONDS", "MAX_TAG_LEN", "Blob", "BlobStore", "MemoryStore", "PartialBlob"]

MAX_TAG_LEN: Final = 80
"""UTF-8 bytes of a tag. Chosen so that a tag, percent-encoded, is a file name everywhere (255 bytes)."""

KEEP_CUT_SECONDS: Final = 600.0
"""As long as Psyche's clients go on trying to download a blob (``shared/network/src/download``)."""


class Blob:
    """A complete blob. It can be read as long as it is held, whatever the store does meanwhile."""

    __slots__ = ("_data", "_outboard")

    def __init__(self, data: Buffer | mmap, outboard: Buffer | mmap) -> None:
        self._data = memoryview(data).toreadonly()
        self._outboard = memoryview(outboard).toreadonly()

    def __len__(self) -> int:
        return len(self._data)

    def __bytes__(self) -> bytes:
        return bytes(self._data)

    @property
    def size(self) -> int:
        """Bytes of data."""
        return len(self._data)

    @property
    def data(self) -> memoryview:
        """All of it, as a view."""
        return self._data

    @property
    def outboard(self) -> memoryview:
        """Its hash pairs, see :mod:`.outboard`."""
        return self._outboard

    def read(self, offset: int, length: int) -> memoryview:
        """``length`` bytes from ``offset``, as a view."""
        return self._data[offset : offset + length]


class PartialBlob(ABC):
    """A download that is under way, or was cut; belongs to the caller of :meth:`BlobStore.begin`.

    Attributes:
        root: the blob's hash.
        prefix: what is proven of it; None if nothing is there.
    """

    root: bytes
    prefix: PrefixVerifier | None

    @abstractmethod
    def new_outboard(self, size: int) -> MutableBuffer:
        """Room for the outboard of a blob of ``size`` bytes, zeroed.

        Raises:
            StoreFullError: there is none.
        """

    @abstractmethod
    def append(self, data: Buffer) -> None:
        """The next bytes of the blob, proven.

        Raises:
            StoreFullError: they do not fit.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def close(self) -> None:
        """Ends the download; what is there may serve a later one, see :class:`BlobStore`."""


class BlobStore(ABC):
    """Blobs by hash. All methods may be called from any thread.

    A download that was cut is kept for ``keep_cut_seconds``, or until its room is needed, so that it can go on.

    Attributes:
        is_prompt: nothing but hashing takes time, so that an event loop may call it: a thread takes longer than
            everything that is done in it.
    """

    is_prompt: bool = False

    @abstractmethod
    def add(self, data: Buffer, *, tag: str | None = None) -> bytes:
        """Keeps a copy of ``data`` and returns its hash. Hashes 64 MiB in about 0.3 s.

        Raises:
            StoreFullError: it does not fit, even without everything that is untagged.
        """

    @abstractmethod
    def get(self, root: bytes) -> Blob | None:
        """The blob, if it is here and complete."""

    @abstractmethod
    def begin(self, root: bytes) -> PartialBlob:
        """Begins a download, or continues one that was cut.

        Raises:
            ExchangeError: one is under way already.
        """

    @abstractmethod
    def complete(self, partial: PartialBlob, *, tag: str | None = None) -> None:
        """Makes a download whose whole blob is proven a blob of the store."""

    @abstractmethod
    def tags(self) -> Mapping[str, bytes]:
        """All tags, with the hash each names."""

    @abstractmethod
    def set_tag(self, name: str, root: bytes) -> None:
        """Names a hash, in place of what the tag named before. The blob need not be here yet."""

    @abstractmethod
    def delete_tags(self, unwanted: Callable[[str], bool]) -> int:
        """Deletes the tags for which ``unwanted(name)`` holds and returns how many."""

    @abstractmethod
    def collect_garbage(self) -> int:
        """Drops blobs that no tag names and downloads cut long ago; returns how many bytes became free."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of data, outboards and unfinished downloads."""

    def __contains__(self, root: bytes) -> bool:
        return self.get(root) is not None


def check_tag(name: str) -> None:
    """Raises ConfigurationError if ``name`` cannot be a tag."""
    if not 1 <= len(name.encode()) <= MAX_TAG_LEN:
        raise ConfigurationError(
            f"a tag has 1 to {MAX_TAG_LEN} bytes, got {len(name.encode())}: {name[:40]!r}", name="tag", value=name
        )


class MemoryStore(BlobStore):
    """Blobs in memory.

    Args:
        max_bytes: limit for everything the store holds; None for no limit.
        keep_cut_seconds: how long a download that was cut may wait to go on.
    """

    is_prompt = True

    def __init__(self, max_bytes: int | None = None, *, keep_cut_seconds: float = KEEP_CUT_SECONDS) -> None:
        self.max_bytes = max_bytes
        self._keep_cut_seconds = keep_cut_seconds
        self._lock = threading.RLock()
        self._blobs: dict[bytes, Blob] = {}
        self._partials: dict[bytes, _MemoryPartial] = {}
        self._tags: dict[str, bytes] = {}
        self._used = 0

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
                self._blobs[root] = Blob(bytes(data), outboard)
            if tag is not None:
                self._tags[tag] = root
        return root

    @override
    def get(self, root: bytes) -> Blob | None:
        return self._blobs.get(root)

    @override
    def begin(self, root: bytes) -> PartialBlob:
        with self._lock:
            partial = self._partials.setdefault(root, _MemoryPartial(self, root))
            if partial.is_open:
                raise ExchangeError(f"blob {root.hex()} is being fetched already")
            partial.is_open = True
            return partial

    @override
    def complete(self, partial: PartialBlob, *, tag: str | None = None) -> None:
        if not isinstance(partial, _MemoryPartial):
            raise ConfigurationError("this download was begun in another store", name="partial")
        if tag is not None:
            check_tag(tag)
        prefix = require_proven(partial)
        with self._lock:
            self._partials.pop(partial.root, None)
            if partial.root in self._blobs:
                self._used -= partial.used
            else:
                self._blobs[partial.root] = Blob(partial.data, prefix.outboard)
            if tag is not None:
                self._tags[tag] = partial.root

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
            self._tags[name] = root

    @override
    def delete_tags(self, unwanted: Callable[[str], bool]) -> int:
        with self._lock:
            names = [name for name in self._tags if unwanted(name)]
            for name in names:
                del self._tags[name]
        return len(names)

    @override
    def collect_garbage(self) -> int:
        return self._collect(time.monotonic() - self._keep_cut_seconds)

    def _collect(self, cut_before: float) -> int:
        with self._lock:
            before = self._used
            named = set(self._tags.values())
            for root in [root for root in self._blobs if root not in named]:
                blob = self._blobs.pop(root)
                self._used -= blob.size + len(blob.outboard)
            for root in [root for root, partial in self._partials.items() if partial.was_cut_before(cut_before)]:
                self._used -= self._partials.pop(root).used
            return before - self._used

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

    def _release(self, length: int) -> None:
        with self._lock:
            self._used -= length


class _MemoryPartial(PartialBlob):
    def __init__(self, store: MemoryStore, root: bytes) -> None:
        self.root = root
        self.prefix = None
        self.data = bytearray()
        self.used = 0
        self.is_open = False
        self._closed_at = -math.inf
        self._store = store

    def was_cut_before(self, moment: float) -> bool:
        return not self.is_open and self._closed_at <= moment

    @override
    def new_outboard(self, size: int) -> MutableBuffer:
        self._take(outboard_len(size))
        return bytearray(outboard_len(size))

    @override
    def append(self, data: Buffer) -> None:
        self._take(len(data))
        self.data += data

    @override
    def restart(self) -> None:
        self._store._release(self.used)
        self.used, self.prefix, self.data = 0, None, bytearray()

    @override
    def close(self) -> None:
        self.is_open = False
        self._closed_at = time.monotonic()

    def _take(self, length: int) -> None:
        self._store._reserve(length)
        self.used += length


def require_proven(partial: PartialBlob) -> PrefixVerifier:
    """What is proven of a blob: all of it.

    Raises:
        HashMismatchError: something is not.
    """
    prefix = partial.prefix
    if prefix is None or not prefix.is_complete:
        have = prefix.length if prefix else 0
        raise HashMismatchError(f"blob {partial.root.hex()} is not complete: {have} bytes are proven", at=have)
    return prefix
