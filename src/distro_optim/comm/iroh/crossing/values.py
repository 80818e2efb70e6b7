"""Values on their way between Python and Rust: bytes in both directions, and the counters of a connection.

The generated code reads and writes each number by itself, through a stream over the buffer and a context manager around
that. Here a value of a known layout is taken in one piece. What the layouts are is tried before it is relied on.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

__all__ = ["Values", "direct_values"]

_LENGTH: Final = struct.Struct(">i")
"""Before the bytes of a value of bytes."""

_COUNTERS: Final = struct.Struct(">6q")
_COUNTER_NAMES: Final = (
    "udp_tx_datagrams",
    "udp_tx_bytes",
    "udp_rx_datagrams",
    "udp_rx_bytes",
    "lost_packets",
    "lost_bytes",
)

_TRIAL_BYTES: Final = (b"", b"\x00", bytes(range(256)) * 3)
_TRIAL_COUNTERS: Final = (1, -2, 3 << 40, 4, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Values:
    """Replacements for ``lift`` and ``lower`` of the converter of bytes, and ``lift`` of that of counters."""

    lift_bytes: Callable[[Any], bytes]
    lower_bytes: Callable[[Any], Any]
    lift_counters: Callable[[Any], Any]


def direct_values(module: ModuleType) -> Values:
    """The replacements for ``module``; raises if one of them gives something else than the original."""
    buffer_type: Any = module._UniffiRustBuffer
    stats_type: Any = module.ConnectionStats
    memmove, string_at, addressof = ctypes.memmove, ctypes.string_at, ctypes.addressof
    head = _LENGTH.size

    def taken(rbuf: Any) -> bytes:
        """What is in a buffer, which is freed."""
        try:
            return string_at(rbuf.data, rbuf.len)
        finally:
            rbuf.free()

    def lift_bytes(rbuf: Any) -> bytes:
        try:
            size = rbuf.len - head
            if size < 0 or _LENGTH.unpack(rbuf.data[:head])[0] != size:
                raise ValueError(f"a buffer of {rbuf.len} bytes does not hold what it says")
            return string_at(addressof(rbuf.data.contents) + head, size)
        finally:
            rbuf.free()

    def lower_bytes(value: Any) -> Any:
        data = value if type(value) is bytes else bytes(value)
        size = len(data)
        if len(value) != size:
            raise ValueError("a buffer of items larger than one byte cannot be written")
        length = _LENGTH.pack(size)  # before anything that would have to be freed
        rbuf = buffer_type.alloc(head + size)
        place = addressof(rbuf.data.contents)
        memmove(place, length, head)
        memmove(place + head, data, size)
        rbuf.len = head + size
        return rbuf

    def lift_counters(rbuf: Any) -> Any:
        return stats_type(**dict(zip(_COUNTER_NAMES, _COUNTERS.unpack(taken(rbuf)), strict=True)))

    values = Values(lift_bytes, lower_bytes, lift_counters)
    _check(module, values)
    return values


def _check(module: ModuleType, values: Values) -> None:
    """Raises if the replacements give something else than the originals."""
    converter: Any = module._UniffiFfiConverterBytes
    for data in _TRIAL_BYTES:
        ours, theirs = values.lower_bytes(data), converter.lower(data)
        written = [rbuf.data[: rbuf.len] for rbuf in (ours, theirs)]
        read = [values.lift_bytes(theirs), converter.lift(ours)]
        if written[0] != written[1] or read != [data, data]:
            raise ValueError("bytes do not cross as they did")
    builders = [module._UniffiRustBufferBuilder() for _ in range(2)]
    for builder in builders:
        for counter in _TRIAL_COUNTERS:
            builder.write_i64(counter)
    ours, theirs = (builder.finalize() for builder in builders)
    if values.lift_counters(ours) != module._UniffiFfiConverterTypeConnectionStats.lift(theirs):
        raise ValueError("the counters of a connection are not what they were")
