"""Borsh, in which Psyche's Solana programs read their instructions and keep their small accounts.

The same annotations as everywhere say what a value looks like:

=======================  =====================================================================================
declared as              bytes
=======================  =====================================================================================
integers, floats         little endian, without padding; NaN is refused, as in Rust's crate
``bool``                 one byte, 0 or 1
text up to N bytes       N bytes, padded with zeros (Psyche's ``FixedString``)
text                     its length as u32, then UTF-8
items up to N            N slots, of which the unused are zero, then how many count as u64 (``FixedVec``)
items, bytes             their number as u32, then themselves
N items, N bytes         themselves
unit enum                one byte
enum with data           one byte, then the variant
``Option``               00, or 01 and the value
struct                   the fields in the order of their declaration
=======================  =====================================================================================

Format: https://borsh.io. Fixed text may hold any bytes, which survive a round trip as surrogates.

Encoding a whole state again and again is what a simulated chain does, so structs of a middling size keep their bytes;
all of them are frozen, and a changed field means another object.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from ...buffer import Reader
from ...comm.declarations import (
    BoolShape,
    BytesShape,
    EnumShape,
    FloatShape,
    IntShape,
    OptionShape,
    SequenceShape,
    Shape,
    StrShape,
    StructShape,
    TupleShape,
    UnitEnumShape,
    ViaShape,
    shape_of,
    step_into,
)
from ...errors import ConfigurationError, LimitExceededError, ProtocolError

__all__ = ["decode", "encode"]

T = TypeVar("T")

_KEPT: Final = "_borsh_bytes"
_KEPT_SIZES: Final = range(64, 16 * 1024)
"""Sizes of structs worth keeping: from a client to a round of 32 reports."""

_FIXED_TEXT: Final = "surrogateescape"


@dataclass(frozen=True)
class _Format:
    """How values of one type are written and read.

    Attributes:
        size: bytes that every value takes; None if it depends on the value.
        least: bytes that any value takes at least.
    """

    write: Callable[[Any], bytes]
    read: Callable[[Reader], Any]
    size: int | None
    least: int


def encode(value: Any, declared: Any = None) -> bytes:
    """The bytes of ``value``.

    Args:
        value: an instance of ``declared``.
        declared: its declaration; by default the class of ``value``.

    Raises:
        ConfigurationError: the value does not fit its declaration, or is NaN.
    """
    return _format_of(type(value) if declared is None else declared).write(value)


def decode(declared: type[T], data: bytes | bytearray | memoryview, *, allow_trailing: bool = False) -> T:
    """The value that ``data`` holds.

    Args:
        declared: its declaration.
        data: the bytes.
        allow_trailing: ignore what follows the value, as Psyche's programs do with instructions and accounts.

    Raises:
        ProtocolError: the bytes are anything else.
    """
    reader = Reader(bytes(data))
    value = _format_of(declared).read(reader)
    if reader.remaining and not allow_trailing:
        raise ProtocolError(f"{reader.remaining} bytes follow the value", offset=reader.pos)
    return cast(T, value)


_KNOWN: dict[int, tuple[Any, _Format]] = {}
_MAX_KNOWN: Final = 1024


def _format_of(declared: Any) -> _Format:
    found = _KNOWN.get(id(declared))
    if found is None:
        if len(_KNOWN) >= _MAX_KNOWN:
            _KNOWN.clear()
        found = _KNOWN[id(declared)] = (declared, _format(shape_of(declared)))
    return found[1]


def _format(shape: Shape) -> _Format:
    match shape:
        case IntShape(bits, signed):
            return _integer(shape, bits // 8, signed)
        case FloatShape(bits):
            return _float(bits)
        case BoolShape():
            return _Format(lambda value: b"\1" if value else b"\0", _read_bool, 1, 1)
        case StrShape(limit):
            return _text() if limit is None else _fixed_text(limit)
        case BytesShape(None, None):
            return _blob()
        case BytesShape(_, int(fixed)):
            return _bytes(fixed)
        case SequenceShape(item, make, None, None):
            return _counted(_format(item), make)
        case SequenceShape(item, make, limit, None) if limit is not None:
            return _slots(_format(item), make, limit)
        case SequenceShape(item, make, _, int(fixed)):
            return _array(_format(item), make, fixed)
        case OptionShape(some):
            return _option(_format(some))
        case UnitEnumShape():
            return _unit_enum(shape)
        case EnumShape():
            return _enum(shape)
        case StructShape(cls):
            return _struct(cls, [(field.name, _format(inner)) for field, inner in shape.fields])
        case TupleShape(parts):
            return _tuple([_format(part) for part in parts])
        case ViaShape(wire, to_wire, from_wire, own):
            return _format(own) if own is not None else _via(_format(wire), to_wire, from_wire)
        case _:
            raise TypeError(f"{shape} has no form in borsh")


# -- numbers, text, bytes ----------------------------------------------------------------------------------------------


def _integer(shape: IntShape, size: int, signed: bool) -> _Format:
    def write(value: int) -> bytes:
        if not shape.low <= value <= shape.high:
            raise ConfigurationError(f"{value} does not fit in {shape.name}", value=value)
        return value.to_bytes(size, "little", signed=signed)

    return _Format(write, lambda r: int.from_bytes(r.pull_bytes(size), "little", signed=signed), size, size)


def _float(bits: int) -> _Format:
    form = struct.Struct("<f" if bits == 32 else "<d")

    def write(value: float) -> bytes:
        if math.isnan(value):
            raise ConfigurationError("NaN cannot be written, and would make the whole instruction undecodable")
        try:
            return form.pack(value)
        except OverflowError:
            raise ConfigurationError(f"{value} does not fit in f{bits}", value=value) from None

    def read(reader: Reader) -> float:
        at = reader.pos
        value = float(form.unpack(reader.pull_bytes(form.size))[0])
        if math.isnan(value):
            raise ProtocolError("NaN is not allowed", offset=at)
        return value

    return _Format(write, read, form.size, form.size)


def _read_bool(reader: Reader) -> bool:
    at = reader.pos
    byte = reader.pull_u8()
    if byte > 1:
        raise ProtocolError(f"a truth value is 0 or 1, not {byte}", offset=at)
    return bool(byte)


def _fixed_text(size: int) -> _Format:
    def write(value: str) -> bytes:
        data = value.encode(errors=_FIXED_TEXT)
        if len(data) > size:
            raise ConfigurationError(f"{value!r} has {len(data)} bytes, but room is for {size}", value=value)
        return data.ljust(size, b"\0")

    def read(reader: Reader) -> str:
        return bytes(reader.pull_bytes(size)).rstrip(b"\0").decode(errors=_FIXED_TEXT)

    return _Format(write, read, size, size)


def _text() -> _Format:
    def write(value: str) -> bytes:
        data = value.encode()
        return len(data).to_bytes(4, "little") + data

    def read(reader: Reader) -> str:
        at = reader.pos
        try:
            return str(reader.pull_bytes(_pull_count(reader, 1)), "utf-8")
        except UnicodeDecodeError:
            raise ProtocolError("a string is not UTF-8", offset=at) from None

    return _Format(write, read, None, 4)


def _blob() -> _Format:
    def write(value: bytes) -> bytes:
        return len(value).to_bytes(4, "little") + value

    return _Format(write, lambda reader: bytes(reader.pull_bytes(_pull_count(reader, 1))), None, 4)


def _bytes(size: int) -> _Format:
    def write(value: bytes) -> bytes:
        if len(value) != size:
            raise ConfigurationError(f"{size} bytes are needed, not {len(value)}", value=value)
        return bytes(value)

    return _Format(write, lambda reader: bytes(reader.pull_bytes(size)), size, size)


def _pull_count(reader: Reader, item_size: int) -> int:
    """A number of items, of which at least so many bytes must be there."""
    at = reader.pos
    count = int.from_bytes(reader.pull_bytes(4), "little")
    if count * max(1, item_size) > reader.remaining:
        raise LimitExceededError(f"{count} items are announced, {reader.remaining} bytes are left", offset=at)
    return count


# -- collections -------------------------------------------------------------------------------------------------------


def _counted(item: _Format, make: Callable[[list[Any]], Any]) -> _Format:
    def write(value: Any) -> bytes:
        return len(value).to_bytes(4, "little") + b"".join(map(item.write, value))

    def read(reader: Reader) -> Any:
        return make(_read_items(reader, item, _pull_count(reader, item.least)))

    return _Format(write, read, None, 4)


def _slots(item: _Format, make: Callable[[list[Any]], Any], slots: int) -> _Format:
    size = item.size
    if size is None:
        raise TypeError("the slots of a FixedVec have one size")
    room = slots * size

    def write(value: Any) -> bytes:
        if len(value) > slots:
            raise ConfigurationError(f"{len(value)} items are too many, room is for {slots}", value=value)
        return b"".join(map(item.write, value)).ljust(room, b"\0") + len(value).to_bytes(8, "little")

    def read(reader: Reader) -> Any:
        start = reader.pos
        body = bytes(reader.pull_bytes(room))
        count = int.from_bytes(reader.pull_bytes(8), "little")
        if count > slots:
            raise LimitExceededError(f"{count} items are announced, room is for {slots}", offset=start + room)
        return make(_read_items(Reader(body), item, count))

    return _Format(write, read, room + 8, room + 8)


def _array(item: _Format, make: Callable[[list[Any]], Any], count: int) -> _Format:
    def write(value: Any) -> bytes:
        if len(value) != count:
            raise ConfigurationError(f"{count} items are needed, not {len(value)}", value=value)
        return b"".join(map(item.write, value))

    size = None if item.size is None else count * item.size
    return _Format(write, lambda reader: make(_read_items(reader, item, count)), size, count * item.least)


def _read_items(reader: Reader, item: _Format, count: int) -> list[Any]:
    items: list[Any] = []
    try:
        for _ in range(count):
            items.append(item.read(reader))
    except ProtocolError as error:
        error.field = step_into(f"[{len(items)}]", error.field)
        raise
    return items


def _tuple(parts: list[_Format]) -> _Format:
    sizes = [part.size for part in parts]

    def write(value: Any) -> bytes:
        return b"".join(part.write(one) for part, one in zip(parts, value, strict=True))

    return _Format(write, lambda r: tuple(part.read(r) for part in parts), _total(sizes), sum(p.least for p in parts))


# -- choices and structs -----------------------------------------------------------------------------------------------


def _option(some: _Format) -> _Format:
    def write(value: Any) -> bytes:
        return b"\0" if value is None else b"\1" + some.write(value)

    def read(reader: Reader) -> Any:
        at = reader.pos
        tag = reader.pull_u8()
        if tag > 1:
            raise ProtocolError(f"an option begins with 0 or 1, not {tag}", offset=at)
        return some.read(reader) if tag else None

    return _Format(write, read, None, 1)


def _pull_tag(reader: Reader, name: str, count: int) -> int:
    at = reader.pos
    tag = reader.pull_u8()
    if tag >= count:
        raise ProtocolError(f"{name} has no variant {tag}, only 0 to {count - 1}", offset=at)
    return tag


def _unit_enum(shape: UnitEnumShape) -> _Format:
    members, name = shape.members, shape.cls.__name__
    numbers = {member: bytes([index]) for index, member in enumerate(members)}
    return _Format(numbers.__getitem__, lambda reader: members[_pull_tag(reader, name, len(members))], 1, 1)


def _enum(shape: EnumShape) -> _Format:
    variants = [(variant.name, _format(variant.shape)) for variant in shape.variants]
    numbers = {variant.cls: index for index, variant in enumerate(shape.variants)}

    def write(value: Any) -> bytes:
        number = numbers.get(type(value))
        if number is None:
            raise ConfigurationError(f"{value!r} is not a variant of {shape.name}", value=value)
        return bytes([number]) + variants[number][1].write(value)

    def read(reader: Reader) -> Any:
        name, variant = variants[_pull_tag(reader, shape.name, len(variants))]
        try:
            return variant.read(reader)
        except ProtocolError as error:
            error.field = step_into(name, error.field)
            raise

    return _Format(write, read, None, 1 + min(variant.least for _, variant in variants))


def _struct(cls: type, fields: list[tuple[str, _Format]]) -> _Format:
    size = _total([inner.size for _, inner in fields])

    def write(value: Any) -> bytes:
        if type(value) is not cls:
            raise ConfigurationError(f"{value!r} is not a {cls.__name__}", value=value)
        parts = []
        for name, inner in fields:
            try:
                parts.append(inner.write(getattr(value, name)))
            except ConfigurationError as error:
                error.name = step_into(name, error.name)
                raise
        return b"".join(parts)

    def write_once(value: Any) -> bytes:
        kept = getattr(value, _KEPT, None)
        if kept is None:
            kept = value.__dict__[_KEPT] = write(value)
        return cast(bytes, kept)

    def read(reader: Reader) -> Any:
        start = reader.pos
        values: list[Any] = []
        try:
            for _, inner in fields:
                values.append(inner.read(reader))
        except ProtocolError as error:
            error.field = step_into(fields[len(values)][0], error.field)
            raise
        try:
            return cls(*values)
        except ValueError as error:
            raise ProtocolError(str(error), offset=start) from None

    kept = size is not None and size in _KEPT_SIZES
    return _Format(write_once if kept else write, read, size, sum(inner.least for _, inner in fields))


def _via(wire: _Format, to_wire: Callable[[Any], Any], from_wire: Callable[[Any], Any]) -> _Format:
    def read(reader: Reader) -> Any:
        at = reader.pos
        value = wire.read(reader)
        try:
            return from_wire(value)
        except ValueError as error:
            raise ProtocolError(str(error), offset=at) from None

    return _Format(lambda value: wire.write(to_wire(value)), read, wire.size, wire.least)


def _total(sizes: list[int | None]) -> int | None:
    """The sum, None if a part is unknown."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
