"""Two cursors over bytes, one that writes and one that reads, in ``push_x`` / ``pull_x`` pairs.

Every codec of the package stands on these: LEB128 varints and zigzag integers as serde's postcard writes them
(https://postcard.jamesmunns.com/wire-format), fixed little-endian numbers, length-prefixed bytes.

A :class:`Reader` does not trust the lengths that it reads: it compares each one with the number of bytes that are left
before it allocates anything, and what it cuts out are views. The only exception that its input can raise is
:class:`~distro_optim.errors.ProtocolError`.
"""

from __future__ import annotations

import struct
from typing import Final

from .errors import LimitExceededError, ProtocolError, TruncatedError

__all__ = ["Reader", "Writer", "varint_size"]

_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")


def varint_size(value: int) -> int:
    """Bytes that :meth:`Writer.push_varint` takes for ``value``."""
    return max(1, -(-value.bit_length() // 7))


class Writer:
    """Appends encoded values to a growing byte string; the inverse of :class:`Reader`, method by method."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def finish(self) -> bytes:
        """All that was pushed so far."""
        return bytes(self._data)

    def push_bytes(self, value: bytes | bytearray | memoryview) -> None:
        """Raw bytes, no length."""
        self._data += value

    def push_u8(self, value: int) -> None:
        """One byte.

        Raises:
            ValueError: ``value`` is not in 0 to 255.
        """
        self._data.append(value)

    def push_bool(self, value: bool) -> None:
        """One byte, 0 or 1."""
        self._data.append(1 if value else 0)

    def push_u16(self, value: int) -> None:
        """Two bytes, little endian; raises ``struct.error`` if ``value`` does not fit."""
        self._data += _U16.pack(value)

    def push_u32(self, value: int) -> None:
        """Four bytes, little endian; raises ``struct.error`` if ``value`` does not fit."""
        self._data += _U32.pack(value)

    def push_varint(self, value: int) -> None:
        """Unsigned LEB128: seven bits per byte, low group first.

        Raises:
            ValueError: ``value`` is negative.
        """
        if value < 0:
            raise ValueError(f"a varint is unsigned, got {value}")
        while value >= 0x80:
            self._data.append(value & 0x7F | 0x80)
            value >>= 7
        self._data.append(value)

    def push_zigzag(self, value: int) -> None:
        """Signed integer folded to unsigned (0, -1, 1, -2, ... -> 0, 1, 2, 3, ...), then a varint."""
        self.push_varint(value * 2 if value >= 0 else -value * 2 - 1)

    def push_blob(self, value: bytes | bytearray | memoryview) -> None:
        """A varint length, then the bytes."""
        self.push_varint(len(value))
        self._data += value


class Reader:
    """Takes values off the front of a byte string.

    Args:
        data: the input; it is viewed, not copied, and must not change while the reader lives.
    """

    __slots__ = ("_data", "_end", "_pos")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self._data = view if view.format == "B" and view.ndim == 1 else view.cast("B")
        self._pos = 0
        self._end = len(self._data)

    @property
    def pos(self) -> int:
        """Bytes taken so far."""
        return self._pos

    @property
    def remaining(self) -> int:
        """Bytes left."""
        return self._end - self._pos

    def pull_bytes(self, length: int) -> memoryview:
        """The next ``length`` bytes as a view of the input.

        Raises:
            TruncatedError: fewer are left.
        """
        start, stop = self._pos, self._pos + length
        if length < 0 or stop > self._end:
            raise TruncatedError(f"{length} bytes are announced, {self.remaining} are left", offset=start)
        self._pos = stop
        return self._data[start:stop]

    def peek(self) -> memoryview:
        """Everything that is left, without taking it."""
        return self._data[self._pos :]

    def pull_u8(self) -> int:
        """One byte, as a number from 0 to 255.

        Raises:
            TruncatedError: no byte is left.
        """
        if self._pos >= self._end:
            raise TruncatedError("1 byte is expected, 0 are left", offset=self._pos)
        value = self._data[self._pos]
        self._pos += 1
        return value

    def pull_bool(self) -> bool:
        """One byte, 0 or 1.

        Raises:
            TruncatedError: no byte is left.
            ProtocolError: it is another number; postcard refuses it too.
        """
        value = self.pull_u8()
        if value > 1:
            raise ProtocolError(f"a bool is 0 or 1, not {value}", offset=self._pos - 1)
        return value == 1

    def pull_u16(self) -> int:
        """Two bytes, little endian.

        Raises:
            TruncatedError: fewer are left.
        """
        return int(_U16.unpack(self.pull_bytes(2))[0])

    def pull_u32(self) -> int:
        """Four bytes, little endian.

        Raises:
            TruncatedError: fewer are left.
        """
        return int(_U32.unpack(self.pull_bytes(4))[0])

    def pull_varint(self, bits: int = 64) -> int:
        """Unsigned LEB128 of at most ``bits`` bits.

        Raises:
            TruncatedError: the bytes end before the number does.
            ProtocolError: it is longer than ``bits`` bits need, or too large for them; postcard refuses it too.
        """
        # Filters and seeds are ten bytes each and a state holds thousands, so the loop touches locals only.
        data, start, end = self._data, self._pos, self._end
        pos, value, shift = start, 0, 0
        while True:
            if pos >= end:
                raise TruncatedError("1 byte is expected, 0 are left", offset=pos)
            byte = data[pos]
            pos += 1
            if byte < 0x80:
                break
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift >= bits:
                raise ProtocolError(f"a varint is longer than {bits} bits", offset=start)
        value |= byte << shift
        if value >> bits:
            raise ProtocolError(f"a varint does not fit in {bits} bits", offset=start)
        self._pos = pos
        return value

    def pull_zigzag(self, bits: int = 64) -> int:
        """A signed integer of at most ``bits`` bits in zigzag form; raises as :meth:`pull_varint` does."""
        folded = self.pull_varint(bits)
        return folded >> 1 if folded & 1 == 0 else -(folded >> 1) - 1

    def pull_length(self, *, item_size: int = 1, limit: int | None = None) -> int:
        """A varint count of items that take at least ``item_size`` bytes each.

        Raises:
            LimitExceededError: the count is above ``limit``.
            TruncatedError: what is left is too short for that many items, so nothing should be allocated for them.
            ProtocolError: the count is not a varint of 64 bits.
        """
        start = self._pos
        count = self.pull_varint(64)
        if limit is not None and count > limit:
            raise LimitExceededError(f"{count} items are announced, at most {limit} are allowed", offset=start)
        if count * item_size > self.remaining:
            raise TruncatedError(f"{count} items are announced, {self.remaining} bytes are left", offset=start)
        return count

    def pull_blob(self, *, limit: int | None = None) -> memoryview:
        """A varint length, then that many bytes, as a view of the input; raises as :meth:`pull_length` does."""
        return self.pull_bytes(self.pull_length(limit=limit))

    def expect_end(self) -> None:
        """Checks that the input was read to its end.

        Raises:
            ProtocolError: bytes are left.
        """
        if self.remaining:
            raise ProtocolError(f"{self.remaining} bytes follow the end of the message", offset=self._pos)
