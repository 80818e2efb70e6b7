"""Requests: the bytes a getter writes on a stream before it closes its side.

A type byte, then the body in postcard. Source: iroh-blobs ``src/protocol.rs``. Bytes behind the body are ignored, as
Rust's decoder does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from ....buffer import Reader, Writer
from ....errors import LimitExceededError, ProtocolError
from .ranges import ALL, ChunkRanges, RangesSeq
from .tree import HASH_LEN, Buffer

__all__ = [
    "ALPN",
    "MAX_REQUEST_LEN",
    "GetManyRequest",
    "GetRequest",
    "ObserveRequest",
    "PushRequest",
    "Request",
    "RequestType",
    "pull_request",
    "push_request",
]

ALPN: Final = b"/iroh-bytes/4"

MAX_REQUEST_LEN: Final = 1024 * 1024
"""Largest body of a request (``MAX_MESSAGE_SIZE`` of iroh-blobs); the type byte is not counted."""


class RequestType(IntEnum):
    """The first byte of a request; 2 to 7 are reserved."""

    GET = 0
    OBSERVE = 1
    PUSH = 8
    GET_MANY = 9


@dataclass(frozen=True, slots=True)
class GetRequest:
    """Chunks of a blob and, from index 1 on, of the blobs whose hashes it lists."""

    hash: bytes
    ranges: RangesSeq

    @classmethod
    def blob(cls, root: bytes, ranges: ChunkRanges = ALL) -> GetRequest:
        """A single raw blob, or the part that is missing of it."""
        return cls(root, RangesSeq.single(ranges))


@dataclass(frozen=True, slots=True)
class ObserveRequest:
    """Which chunks of a blob the provider has, now and as that changes."""

    hash: bytes
    ranges: ChunkRanges = ALL


@dataclass(frozen=True, slots=True)
class PushRequest:
    """The getter wants to send: a response follows on the same stream."""

    hash: bytes
    ranges: RangesSeq


@dataclass(frozen=True, slots=True)
class GetManyRequest:
    """Chunks of several blobs; index i of ``ranges`` is ``hashes[i]``."""

    hashes: tuple[bytes, ...]
    ranges: RangesSeq


Request: TypeAlias = GetRequest | ObserveRequest | PushRequest | GetManyRequest


def push_request(request: Request) -> bytes:
    """The bytes of a request."""
    writer = Writer()
    match request:
        case GetRequest(root, ranges):
            writer.push_u8(RequestType.GET)
            writer.push_bytes(root)
            ranges.push(writer)
        case ObserveRequest(root, chunks):
            writer.push_u8(RequestType.OBSERVE)
            writer.push_bytes(root)
            chunks.push(writer)
        case GetManyRequest(hashes, ranges):
            writer.push_u8(RequestType.GET_MANY)
            writer.push_varint(len(hashes))
            for root in hashes:
                writer.push_bytes(root)
            ranges.push(writer)
        case PushRequest(root, ranges):
            body = Writer()
            body.push_bytes(root)
            ranges.push(body)
            writer.push_u8(RequestType.PUSH)
            writer.push_blob(body.finish())
    return writer.finish()


def pull_request(data: Buffer) -> Request:
    """The pair of :func:`push_request`.

    Raises:
        LimitExceededError: the body is longer than :data:`MAX_REQUEST_LEN`.
        ProtocolError: anything else is wrong with it.
    """
    if len(data) > 1 + MAX_REQUEST_LEN:
        raise LimitExceededError(f"a request of {len(data)} bytes, at most {1 + MAX_REQUEST_LEN} are allowed")
    reader = Reader(data)
    match reader.pull_u8():
        case RequestType.GET:
            return GetRequest(bytes(reader.pull_bytes(HASH_LEN)), RangesSeq.pull(reader))
        case RequestType.OBSERVE:
            return ObserveRequest(bytes(reader.pull_bytes(HASH_LEN)), ChunkRanges.pull(reader))
        case RequestType.PUSH:
            body = Reader(reader.pull_blob(limit=MAX_REQUEST_LEN))
            return PushRequest(bytes(body.pull_bytes(HASH_LEN)), RangesSeq.pull(body))
        case RequestType.GET_MANY:
            count = reader.pull_length(item_size=HASH_LEN)
            hashes = tuple(bytes(reader.pull_bytes(HASH_LEN)) for _ in range(count))
            return GetManyRequest(hashes, RangesSeq.pull(reader))
        case kind:
            raise ProtocolError(f"requests of type {kind} are not known", offset=0)
