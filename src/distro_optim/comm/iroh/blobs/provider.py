"""A provider's side of one stream, without I/O: the request's bytes go in, the answer's pieces come out.

Answers are those of iroh-blobs (``src/provider.rs``): data, then a plain end of the stream; a reset with code 3 as
soon as a blob is unknown; for requests that cannot be read, an end without a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from ....buffer import Writer
from ....errors import ProtocolError
from .encoder import PIECE_LEN, ReadableBlob, encode
from .request import (
    MAX_REQUEST_LEN,
    GetManyRequest,
    GetRequest,
    ObserveRequest,
    PushRequest,
    Request,
    RequestType,
    pull_request,
)
from .tree import HASH_LEN, Buffer

__all__ = [
    "ERR_INTERNAL",
    "ERR_LIMIT",
    "ERR_PERMISSION",
    "Action",
    "Finish",
    "KeepOpen",
    "ProviderStream",
    "Reset",
    "Send",
    "StopReading",
]

# Application error codes of iroh-blobs (`src/protocol.rs`).
ERR_PERMISSION: Final = 1
ERR_LIMIT: Final = 2
ERR_INTERNAL: Final = 3
"""Everything that is neither of the others, above all: no such blob."""

_KNOWN_TYPES: Final = frozenset(int(kind) for kind in RequestType)


@dataclass(frozen=True, slots=True)
class Send:
    """Write these bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Finish:
    """End our direction of the stream; nothing follows."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Abort our direction of the stream with ``code``; nothing follows."""

    code: int


@dataclass(frozen=True, slots=True)
class StopReading:
    """Tell the peer, with ``code``, that no more of its direction is read."""

    code: int


@dataclass(frozen=True, slots=True)
class KeepOpen:
    """Leave the stream as it is until the peer stops it; nothing follows."""


Action: TypeAlias = Send | Finish | Reset | StopReading | KeepOpen


class ProviderStream:
    """One request and its answer.

    Args:
        lookup: hash -> complete blob, or None. Called while the answer is made, once for each blob asked for.
        piece_len: bytes of data to send at once, about.
    """

    def __init__(self, lookup: Callable[[bytes], ReadableBlob | None], *, piece_len: int = PIECE_LEN) -> None:
        self._lookup = lookup
        self._piece_len = piece_len
        self._request = bytearray()
        self._answered = False
        self._costly = False

    @property
    def is_costly(self) -> bool:
        """Whether the answer may take much hashing, as parts of chunk groups are asked for. Known with the request."""
        return self._costly

    @property
    def is_answered(self) -> bool:
        """Whether the answer was begun: what else arrives does not matter."""
        return self._answered

    def receive(self, data: Buffer) -> Iterator[Action]:
        """Takes bytes of the request; yields what to do at once, mostly nothing."""
        if self._answered:
            return
        self._request += data
        kind = self._request[0] if self._request else RequestType.GET
        if kind == RequestType.PUSH:
            # Its data would follow on this stream; we take blobs only from providers we chose.
            self._answered = True
            yield StopReading(ERR_PERMISSION)
            yield Reset(ERR_PERMISSION)
        elif kind not in _KNOWN_TYPES or len(self._request) > 1 + MAX_REQUEST_LEN:
            self._answered = True
            self._request.clear()
            yield StopReading(0)
            yield Finish()

    def receive_end(self) -> Iterator[Action]:
        """The peer closed its direction: the request is complete. Yields the answer as it is taken."""
        if self._answered:
            return iter(())
        self._answered = True
        try:
            request = pull_request(self._request)
        except ProtocolError:
            return iter((Finish(),))
        finally:
            self._request.clear()
        self._costly = isinstance(request, GetRequest | GetManyRequest) and not request.ranges.is_aligned
        return self._answer(request)

    def _answer(self, request: Request) -> Iterator[Action]:
        try:
            match request:
                case GetRequest():
                    yield from self._answer_get(request)
                case GetManyRequest():
                    yield from self._answer_get_many(request)
                case ObserveRequest():
                    yield from self._answer_observe(request)
                case PushRequest():
                    yield Reset(ERR_PERMISSION)
        except OSError:
            # The store lost the data while it was being read.
            yield Reset(ERR_INTERNAL)

    def _answer_get(self, request: GetRequest) -> Iterator[Action]:
        sequence: ReadableBlob | None = None
        for start, stop, ranges in request.ranges.spans():
            index = start
            while stop is None or index < stop:
                root = request.hash
                if index > 0:
                    sequence = sequence or self._lookup(root)
                    if sequence is None or sequence.size % HASH_LEN:
                        yield Reset(ERR_INTERNAL)
                        return
                    if index * HASH_LEN > sequence.size:
                        # The first index past the end of the sequence ends the answer, without error.
                        yield Finish()
                        return
                    root = bytes(sequence.read((index - 1) * HASH_LEN, HASH_LEN))
                blob = self._lookup(root)
                if blob is None:
                    yield Reset(ERR_INTERNAL)
                    return
                for piece in encode(blob, ranges, self._piece_len):
                    yield Send(piece)
                index += 1
        yield Finish()

    def _answer_get_many(self, request: GetManyRequest) -> Iterator[Action]:
        for start, stop, ranges in request.ranges.spans():
            for root in request.hashes[start:stop]:
                blob = self._lookup(root)
                if blob is None:
                    yield Reset(ERR_INTERNAL)
                    return
                for piece in encode(blob, ranges, self._piece_len):
                    yield Send(piece)
        yield Finish()

    def _answer_observe(self, request: ObserveRequest) -> Iterator[Action]:
        """The present state. Complete blobs do not change and unknown ones we do not wait for, so it stays at that."""
        blob = self._lookup(request.hash)
        item = Writer()
        item.push_varint(blob.size if blob else 0)
        boundaries = (0,) if blob else ()
        item.push_varint(len(boundaries))
        for boundary in boundaries:
            item.push_varint(boundary)
        framed = Writer()
        framed.push_blob(item.finish())
        yield Send(framed.finish())
        yield KeepOpen()
