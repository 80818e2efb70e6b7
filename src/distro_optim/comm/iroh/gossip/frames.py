"""Frames on a gossip stream.

A stream carries one topic in one direction (n0-computer/iroh-gossip ``src/net/util.rs``)::

    u32 big endian length, that many bytes        first frame: the topic id, so its length is 32
    u32 big endian length, that many bytes        every later frame: one message
    ...
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from ....errors import LimitExceededError, ProtocolError
from .messages import ID_SIZE, TopicId

__all__ = ["FrameReader", "encode_frame", "encode_header"]

_LENGTH: Final = struct.Struct(">I")


def encode_frame(payload: bytes) -> bytes:
    """One frame."""
    return _LENGTH.pack(len(payload)) + payload


def encode_header(topic: TopicId) -> bytes:
    """The first frame of a stream."""
    return encode_frame(topic)


class FrameReader:
    """Cuts what arrives on one stream into frames.

    Holds at most one incomplete frame beyond what :meth:`feed` is given.

    Args:
        max_message_size: frames longer than this are refused when their length is read, before they are stored.
        sizes: the same for single topics.

    Attributes:
        topic: the topic of the stream, once the header has been read.
    """

    __slots__ = ("_buffer", "_limit", "_sizes", "topic")

    def __init__(self, max_message_size: int, sizes: Mapping[TopicId, int] | None = None) -> None:
        self.topic: TopicId | None = None
        self._limit = max_message_size
        self._sizes = sizes if sizes is not None else {}
        self._buffer = b""

    def feed(self, data: bytes) -> list[memoryview]:
        """The messages that are complete after ``data``, in order. Views of a buffer that does not change.

        Raises:
            ProtocolError: the header is not 32 bytes long.
            LimitExceededError: a frame is longer than the maximum.
        """
        buffer = self._buffer + data if self._buffer else data
        view = memoryview(buffer)
        frames = []
        pos, end = 0, len(buffer)
        while end - pos >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, pos)
            if self.topic is None and length != ID_SIZE:
                raise ProtocolError(f"a gossip stream begins with a topic id of {ID_SIZE} bytes, not {length}")
            if length > self._limit:
                raise LimitExceededError(f"a gossip frame of {length} bytes, at most {self._limit} are allowed")
            start = pos + _LENGTH.size
            if end - start < length:
                break
            pos = start + length
            if self.topic is None:
                self.topic = bytes(view[start:pos])
                self._limit = self._sizes.get(self.topic, self._limit)
            else:
                frames.append(view[start:pos])
        self._buffer = buffer[pos:]
        return frames
