"""The plainest zip file: entries that are stored, not compressed, below 4 GiB. Read strictly, written aligned. No I/O.

That is all PyTorch's archives use. Reading goes by the central directory alone and takes views of the input; nothing
is allocated for what the file claims, and no entry may reach into the directory or past the end, so overlapping or
"bomb" entries cost nothing.

Format: PKWARE APPNOTE 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import Final

from ....errors import ConfigurationError, LimitExceededError, ProtocolError

__all__ = ["MAX_ARCHIVE_SIZE", "read_entries", "write_entries"]

MAX_ARCHIVE_SIZE: Final = 2**32 - 1
"""Offsets and sizes are 32 bits; the 64-bit extension is not read."""

_MAX_ENTRIES: Final = 64
"""A tensor's archive has 8 entries; chosen with room."""

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_STORED: Final = 0
_ENCRYPTED: Final = 0x0001
_UTF8_NAMES: Final = 0x0800
# PyTorch maps tensors into memory and pads to this, with an extra field FB (`caffe2/serialize/inline_container.h`).
_ALIGNMENT: Final = 64
_PADDING_ID: Final = b"FB"
_PADDING_HEADER: Final = 4


def read_entries(data: bytes | bytearray | memoryview) -> dict[str, memoryview]:
    """The entries of an archive by name, as views of ``data``.

    Checksums are not compared: a reader that got the archive as a blob has verified its BLAKE3 hash.

    Raises:
        ProtocolError: it is not such an archive, or an entry is compressed, encrypted, twice there or out of bounds.
    """
    view = memoryview(data)
    if len(view) > MAX_ARCHIVE_SIZE:
        raise LimitExceededError(f"an archive has at most {MAX_ARCHIVE_SIZE} bytes, got {len(view)}")
    end = len(view) - _END.size
    if end < 0:
        raise ProtocolError("too short for an archive")
    magic, disk, directory_disk, here, count, directory_size, directory, comment = _END.unpack_from(view, end)
    if magic != _END_MAGIC or comment != 0:
        raise ProtocolError("no archive: its last bytes are not those of a directory", offset=end)
    if disk or directory_disk or here != count:
        raise ProtocolError("an archive in several parts is not read", offset=end)
    if count > _MAX_ENTRIES:
        raise LimitExceededError(f"{count} entries, at most {_MAX_ENTRIES} are read", offset=end)
    if directory + directory_size > end:
        raise ProtocolError("the directory lies outside the archive", offset=end)

    entries: dict[str, memoryview] = {}
    position, stop = directory, directory + directory_size
    for _ in range(count):
        if position + _CENTRAL.size > stop:
            raise ProtocolError("the directory ends within an entry", offset=position)
        fields = _CENTRAL.unpack_from(view, position)
        magic, flags, method, stored, size = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_size, extra_size, note_size, local = fields[10], fields[11], fields[12], fields[16]
        name_at = position + _CENTRAL.size
        position = name_at + name_size + extra_size + note_size
        if magic != _CENTRAL_MAGIC or position > stop:
            raise ProtocolError("the directory is malformed", offset=name_at - _CENTRAL.size)
        if method != _STORED or stored != size or flags & _ENCRYPTED:
            raise ProtocolError("compressed or encrypted entries are not read", offset=name_at)
        try:
            name = bytes(view[name_at : name_at + name_size]).decode("utf-8")
        except UnicodeDecodeError:
            raise ProtocolError("the name of an entry is not UTF-8", offset=name_at) from None
        if name in entries:
            raise ProtocolError("two entries have the same name", offset=name_at)
        entries[name] = _body(view, local, size, name_size, directory)
    return entries


def _body(view: memoryview, local: int, size: int, name_size: int, directory: int) -> memoryview:
    if local + _LOCAL.size > directory:
        raise ProtocolError("an entry lies outside the archive", offset=local)
    fields = _LOCAL.unpack_from(view, local)
    if fields[0] != _LOCAL_MAGIC or fields[9] != name_size:
        raise ProtocolError("an entry does not begin where the directory says", offset=local)
    start = local + _LOCAL.size + name_size + fields[10]
    if start + size > directory:
        raise ProtocolError("an entry reaches into the directory", offset=local)
    return view[start : start + size]


def write_entries(entries: Iterable[tuple[str, bytes | memoryview]]) -> bytes:
    """An archive of ``entries``, each body aligned to 64 bytes; equal entries give equal bytes.

    Raises:
        ConfigurationError: the archive would have 4 GiB or more.
    """
    parts: list[bytes | memoryview] = []
    directory: list[bytes] = []
    position = 0
    for name, body in entries:
        encoded = name.encode()
        checksum = zlib.crc32(body)
        padding = -(position + _LOCAL.size + len(encoded) + _PADDING_HEADER) % _ALIGNMENT
        extra = _PADDING_ID + struct.pack("<H", padding) + b"Z" * padding
        size = len(body)
        if position + size + _ALIGNMENT * 4 > MAX_ARCHIVE_SIZE:
            raise ConfigurationError("an archive of 4 GiB or more cannot be written; shard the tensor", name="entries")
        sizes = (checksum, size, size, len(encoded))
        header = _LOCAL.pack(_LOCAL_MAGIC, 0, _UTF8_NAMES, _STORED, 0, 0, *sizes, len(extra))
        directory.append(
            _CENTRAL.pack(_CENTRAL_MAGIC, 0, 0, _UTF8_NAMES, _STORED, 0, 0, *sizes, 0, 0, 0, 0, 0, position) + encoded
        )
        parts += [header, encoded, extra, body]
        position += len(header) + len(encoded) + len(extra) + size
    count, listing = len(directory), b"".join(directory)
    end = _END.pack(_END_MAGIC, 0, 0, count, count, len(listing), position, 0)
    return b"".join([*parts, listing, end])
