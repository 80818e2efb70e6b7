"""Two cursors over bytes, one that writes and one that reads, in ``push_x`` / ``pull_x`` pairs.

Every codec of the package stands on these: LEB128 varints and zigzag integers as serde's postcard writes them
(https://postcard.jamesmunns.com/wire-format), fixed little-endian numbers, length-prefixed bytes.

A :class:`Reader` never allocates on the word of the input: a length is compared with what is left before
anything of that size is made, and slices are views. It raises only :class:`~distro_optim.errors.ProtocolError`.
"""

from __future__ import annotations

import struct
from typing import Final

from .errors import LimitExceededError, ProtocolError, TruncatedError

__all__ = ["Reader", "Writer"]

_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_U32_BE: Final = struct.Struct(">I")
_F32: Final = struct.Struct("<f")
_F64: Final = struct.Struct("<d")


class Writer:
    """Appends encoded values to a growing byte string."""

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
        self._data.append(value)

    def push_bool(self, value: bool) -> None:
        self._data.append(1 if value else 0)

    def push_u16(self, value: int) -> None:
        """Two bytes, little endian."""
        self._data += _U16.pack(value)

    def push_u32(self, value: int) -> None:
        """Four bytes, little endian."""
        self._data += _U32.pack(value)

    def push_u32_be(self, value: int) -> None:
        """Four bytes, big endian."""
        self._data += _U32_BE.pack(value)

    def push_u64(self, value: int) -> None:
        """Eight bytes, little endian."""
        self._data += _U64.pack(value)

    def push_f32(self, value: float) -> None:
        self._data += _F32.pack(value)

    def push_f64(self, value: float) -> None:
        self._data += _F64.pack(value)

    def push_varint(self, value: int) -> None:
        """Unsigned LEB128: seven bits a byte, low group first."""
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
        """The next ``length`` bytes as a view of the input."""
        start, stop = self._pos, self._pos + length
        if length < 0 or stop > self._end:
            raise TruncatedError(f"{length} bytes are announced, {self.remaining} are left", offset=start)
        self._pos = stop
        return self._data[start:stop]

    def peek(self) -> memoryview:
        """Everything that is left, without taking it."""
        return self._data[self._pos :]

    def pull_u8(self) -> int:
        if self._pos >= self._end:
            raise TruncatedError("1 byte is expected, 0 are left", offset=self._pos)
        value = self._data[self._pos]
        self._pos += 1
        return value

    def pull_bool(self) -> bool:
        """One byte, 0 or 1; anything else is an error, as in postcard."""
        value = self.pull_u8()
        if value > 1:
            raise ProtocolError(f"a bool is 0 or 1, not {value}", offset=self._pos - 1)
        return value == 1

    def pull_u16(self) -> int:
        return int(_U16.unpack(self.pull_bytes(2))[0])

    def pull_u32(self) -> int:
        return int(_U32.unpack(self.pull_bytes(4))[0])

    def pull_u32_be(self) -> int:
        return int(_U32_BE.unpack(self.pull_bytes(4))[0])

    def pull_u64(self) -> int:
        return int(_U64.unpack(self.pull_bytes(8))[0])

    def pull_f32(self) -> float:
        return float(_F32.unpack(self.pull_bytes(4))[0])

    def pull_f64(self) -> float:
        return float(_F64.unpack(self.pull_bytes(8))[0])

    def pull_varint(self, bits: int = 64) -> int:
        """Unsigned LEB128 of at most ``bits`` bits. Over-long and too large forms are errors, as in postcard."""
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
        """Signed integer of at most ``bits`` bits in zigzag form."""
        folded = self.pull_varint(bits)
        return folded >> 1 if folded & 1 == 0 else -(folded >> 1) - 1

    def pull_length(self, *, item_size: int = 1, limit: int | None = None) -> int:
        """A varint count of items that take at least ``item_size`` bytes each.

        Raises:
            LimitExceededError: the count is above ``limit``.
            TruncatedError: so many items cannot be in what is left; nothing should be allocated for them.
        """
        start = self._pos
        count = self.pull_varint(64)
        if limit is not None and count > limit:
            raise LimitExceededError(f"{count} items are announced, at most {limit} are allowed", offset=start)
        if count * item_size > self.remaining:
            raise TruncatedError(f"{count} items are announced, {self.remaining} bytes are left", offset=start)
        return count

    def pull_blob(self, *, limit: int | None = None) -> memoryview:
        """A varint length, then that many bytes, as a view of the input."""
        return self.pull_bytes(self.pull_length(limit=limit))

    def expect_end(self) -> None:
        """Raises ProtocolError if bytes are left."""
        if self.remaining:
            raise ProtocolError(f"{self.remaining} bytes follow the end of the message", offset=self._pos)
