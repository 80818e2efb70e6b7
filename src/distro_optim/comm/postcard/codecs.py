"""The encoders and decoders that :mod:`.postcard` puts together: one small codec per wire type.

Each is a pair of closures, made once per declaration. They know nothing of Python's annotations.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...buffer import Reader, Writer
from ...errors import ConfigurationError, LimitExceededError, ProtocolError
from ..declarations import IntShape, step_into
from .decoded_values import HEAD, DecodedValues
from .varints import WORTHWHILE, decode_few, decode_varints, encode_varints

MAX_NESTING: Final = 64
"""How often a recursive type may contain itself. Chosen well below Python's own recursion limit."""

_CACHE_ATTRIBUTE: Final = "_postcard_bytes"

Encode = Callable[[bytearray, Any, int], None]  # (output, value, nesting)
Decode = Callable[[Reader, int], Any]  # (input, nesting)


class BadValue(Exception):
    """A value that does not fit its declaration; the path grows while the exception climbs."""

    def __init__(self, message: str, value: object) -> None:
        super().__init__(message)
        self.message = message
        self.value = value
        self.path = ""


@dataclass(frozen=True)
class Codec:
    """The compiled form of one declaration.

    Attributes:
        write: appends a value to a buffer, given how deep it is nested.
        read: takes a value off a reader, given how deep it is nested.
        min_size: the fewest bytes a value takes.
    """

    write: Encode
    read: Decode
    min_size: int

    def encode(self, value: Any) -> bytes:
        """The bytes of ``value``; see :func:`~.postcard.encode`."""
        out = bytearray()
        try:
            self.write(out, value, 0)
        except BadValue as bad:
            where = f"{bad.path}: " if bad.path else ""
            raise ConfigurationError(f"{where}{bad.message}", name=bad.path or None, value=bad.value) from None
        return bytes(out)

    def decode(self, data: bytes | bytearray | memoryview, *, allow_trailing: bool = False) -> Any:
        """The value that ``data`` holds; see :func:`~.postcard.decode`."""
        reader = Reader(data)
        value = self.read(reader, 0)
        if not allow_trailing:
            reader.expect_end()
        return value

    def push(self, writer: Writer, value: Any) -> None:
        """Appends the encoded value."""
        writer.push_bytes(self.encode(value))

    def pull(self, reader: Reader) -> Any:
        """Takes one value off the front; what follows it is left."""
        return self.read(reader, 0)


# -- numbers -----------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    _append_varint(out, value)
    return bytes(out)


def _append_varint(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def int_codec(shape: IntShape) -> Codec:
    """An integer: one byte, or a varint, zigzag if it is signed."""
    bits, signed, low, high, kind = shape.bits, shape.signed, shape.low, shape.high, shape.name

    def check(value: int) -> None:
        if not low <= value <= high:
            raise BadValue(f"{value} does not fit in {kind}", value)

    def encode_byte(out: bytearray, value: int, depth: int) -> None:
        check(value)
        out.append(value & 0xFF)

    def decode_u8(reader: Reader, depth: int) -> int:
        return reader.pull_u8()

    def decode_i8(reader: Reader, depth: int) -> int:
        byte = reader.pull_u8()
        return byte - 256 if byte >= 128 else byte

    def encode_unsigned(out: bytearray, value: int, depth: int) -> None:
        if not 0 <= value <= high:
            check(value)
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)

    def decode_unsigned(reader: Reader, depth: int) -> int:
        return reader.pull_varint(bits)

    def encode_signed(out: bytearray, value: int, depth: int) -> None:
        check(value)
        _append_varint(out, value * 2 if value >= 0 else -value * 2 - 1)

    def decode_signed(reader: Reader, depth: int) -> int:
        return reader.pull_zigzag(bits)

    if bits == 8:
        return Codec(encode_byte, decode_i8 if signed else decode_u8, 1)
    return Codec(encode_signed, decode_signed, 1) if signed else Codec(encode_unsigned, decode_unsigned, 1)


def float_codec(bits: int) -> Codec:
    """A float of 32 or 64 bits, little endian."""
    form = struct.Struct("<f" if bits == 32 else "<d")
    size = form.size

    def encode_float(out: bytearray, value: float, depth: int) -> None:
        try:
            out += form.pack(value)
        except OverflowError:
            raise BadValue(f"{value} does not fit in f{bits}", value) from None

    def decode_float(reader: Reader, depth: int) -> float:
        return float(form.unpack(reader.pull_bytes(size))[0])

    return Codec(encode_float, decode_float, size)


def _encode_bool(out: bytearray, value: bool, depth: int) -> None:
    out.append(1 if value else 0)


def _encode_nothing(out: bytearray, value: None, depth: int) -> None:
    pass


BOOL: Final = Codec(_encode_bool, lambda reader, depth: reader.pull_bool(), 1)
NOTHING: Final = Codec(_encode_nothing, lambda reader, depth: None, 0)


# -- bytes and text ----------------------------------------------------------------------------------------------------


def blob_codec(limit: int | None) -> Codec:
    """Bytes behind their number as a varint; at most ``limit``."""

    def encode_blob(out: bytearray, value: bytes, depth: int) -> None:
        if limit is not None and len(value) > limit:
            raise BadValue(f"{len(value)} bytes are above the limit of {limit}", value)
        _append_varint(out, len(value))
        out += value

    def decode_blob(reader: Reader, depth: int) -> bytes:
        return bytes(reader.pull_blob(limit=limit))

    return Codec(encode_blob, decode_blob, 1)


def raw_codec(size: int) -> Codec:
    """Exactly ``size`` bytes, without a length."""

    def encode_raw(out: bytearray, value: bytes, depth: int) -> None:
        if len(value) != size:
            raise BadValue(f"{size} bytes are needed, not {len(value)}", value)
        out += value

    def decode_raw(reader: Reader, depth: int) -> bytes:
        return bytes(reader.pull_bytes(size))

    return Codec(encode_raw, decode_raw, size)


def str_codec(limit: int | None) -> Codec:
    """UTF-8 text behind its number of bytes as a varint; at most ``limit`` bytes."""
    blob = blob_codec(limit)

    def encode_str(out: bytearray, value: str, depth: int) -> None:
        try:
            data = value.encode()
        except UnicodeEncodeError:
            raise BadValue(f"{value!r} cannot be written as UTF-8", value) from None
        blob.write(out, data, depth)

    def decode_str(reader: Reader, depth: int) -> str:
        start = reader.pos
        try:
            return str(reader.pull_blob(limit=limit), "utf-8")
        except UnicodeDecodeError:
            raise ProtocolError("a string is not UTF-8", offset=start) from None

    return Codec(encode_str, decode_str, 1)


# -- collections -------------------------------------------------------------------------------------------------------


def _encode_items(out: bytearray, items: Any, encode_item: Encode, depth: int) -> None:
    index = 0
    try:
        for index, item in enumerate(items):  # noqa: B007 - the handler reads it
            encode_item(out, item, depth)
    except BadValue as bad:
        bad.path = step_into(f"[{index}]", bad.path)
        raise


def _decode_items(reader: Reader, count: int, decode_item: Decode, depth: int) -> list[Any]:
    items: list[Any] = []
    try:
        for _ in range(count):
            items.append(decode_item(reader, depth))
    except ProtocolError as error:
        error.field = step_into(f"[{len(items)}]", error.field)
        raise
    return items


def sequence_codec(
    item: Codec,
    make: Callable[[list[Any]], Any],
    limit: int | None,
    to_items: Callable[[Any], Iterable[Any]] = iter,
) -> Codec:
    """A count and that many items."""
    if item.min_size == 0 and limit is None:
        raise TypeError("a sequence of items that may take no bytes needs a Limit")
    encode_item, decode_item, item_size = item.write, item.read, item.min_size

    def encode_sequence(out: bytearray, value: Any, depth: int) -> None:
        if limit is not None and len(value) > limit:
            raise BadValue(f"{len(value)} items are above the limit of {limit}", value)
        _append_varint(out, len(value))
        _encode_items(out, to_items(value), encode_item, depth)

    def decode_sequence(reader: Reader, depth: int) -> Any:
        count = reader.pull_length(item_size=item_size, limit=limit)
        return make(_decode_items(reader, count, decode_item, depth))

    return Codec(encode_sequence, decode_sequence, 1)


def int_sequence_codec(shape: IntShape, make: Callable[[list[Any]], Any], limit: int | None) -> Codec:
    """A count and that many varints; the many are written and read at once, the few or the faulty one by one."""
    item = int_codec(shape)
    plain = sequence_codec(item, make, limit)

    def encode_ints(out: bytearray, value: Any, depth: int) -> None:
        encoded = None
        if len(value) >= WORTHWHILE and (limit is None or len(value) <= limit):
            encoded = encode_varints(value, shape)
        if encoded is None:
            plain.write(out, value, depth)
        else:
            _append_varint(out, len(value))
            out += encoded

    def decode_ints(reader: Reader, depth: int) -> Any:
        count = reader.pull_length(limit=limit)
        if count >= WORTHWHILE:
            decoded = decode_varints(reader.peek(), count, shape)
            if decoded is not None:
                values, taken = decoded
                reader.pull_bytes(taken)
                return make(values)
        return make(decode_few_ints(reader, count, depth))

    decode_few_ints = _few_ints(shape, item)
    return Codec(encode_ints, decode_ints, 1)


def _few_ints(shape: IntShape, item: Codec) -> Callable[[Reader, int, int], list[Any]]:
    """Reads so many varints, given their number and how deep they are nested."""

    def decode(reader: Reader, count: int, depth: int) -> list[Any]:
        decoded = decode_few(reader.peek(), count, shape.bits) if count < WORTHWHILE and not shape.signed else None
        if decoded is None:
            return _decode_items(reader, count, item.read, depth)
        values, taken = decoded
        reader.pull_bytes(taken)
        return list(values)

    return decode


def int_array_codec(shape: IntShape, make: Callable[[list[Any]], Any], count: int) -> Codec:
    """A fixed number of varints, without a count."""
    item = int_codec(shape)
    plain = array_codec(item, make, count)
    decode_few_ints = _few_ints(shape, item)

    def decode_ints(reader: Reader, depth: int) -> Any:
        return make(decode_few_ints(reader, count, depth))

    return Codec(plain.write, decode_ints, plain.min_size)


def array_codec(item: Codec, make: Callable[[list[Any]], Any], count: int) -> Codec:
    """A fixed number of items, without a count."""
    encode_item, decode_item = item.write, item.read

    def encode_array(out: bytearray, value: Any, depth: int) -> None:
        if len(value) != count:
            raise BadValue(f"{count} items are needed, not {len(value)}", value)
        _encode_items(out, value, encode_item, depth)

    def decode_array(reader: Reader, depth: int) -> Any:
        return make(_decode_items(reader, count, decode_item, depth))

    return Codec(encode_array, decode_array, count * item.min_size)


def tuple_codec(parts: list[Codec]) -> Codec:
    """Parts of their own types, one after the other."""
    encoders = [part.write for part in parts]
    decoders = [part.read for part in parts]

    def encode_tuple(out: bytearray, value: Any, depth: int) -> None:
        if len(value) != len(encoders):
            raise BadValue(f"{len(encoders)} items are needed, not {len(value)}", value)
        index = 0
        try:
            for index, encode_part in enumerate(encoders):
                encode_part(out, value[index], depth)
        except BadValue as bad:
            bad.path = step_into(f"[{index}]", bad.path)
            raise

    def decode_tuple(reader: Reader, depth: int) -> Any:
        values: list[Any] = []
        try:
            for decode_part in decoders:
                values.append(decode_part(reader, depth))
        except ProtocolError as error:
            error.field = step_into(f"[{len(values)}]", error.field)
            raise
        return tuple(values)

    return Codec(encode_tuple, decode_tuple, sum(part.min_size for part in parts))


def map_codec(key: Codec, value: Codec, limit: int | None) -> Codec:
    """A dict. Of a key that comes twice the last value counts, as in serde."""
    return sequence_codec(tuple_codec([key, value]), dict, limit, to_items=lambda mapping: mapping.items())


# -- choices -----------------------------------------------------------------------------------------------------------


def option_codec(some: Codec) -> Codec:
    """00 for None, or 01 and the value."""
    encode_some, decode_some = some.write, some.read

    def encode_option(out: bytearray, value: Any, depth: int) -> None:
        if value is None:
            out.append(0)
        else:
            out.append(1)
            encode_some(out, value, depth)

    def decode_option(reader: Reader, depth: int) -> Any:
        start = reader.pos
        tag = reader.pull_u8()
        if tag > 1:
            raise ProtocolError(f"an option begins with 0 or 1, not {tag}", offset=start)
        return decode_some(reader, depth) if tag else None

    return Codec(encode_option, decode_option, 1)


def _pull_variant(reader: Reader, name: str, count: int) -> int:
    start = reader.pos
    index = reader.pull_varint(32)
    if index >= count:
        raise ProtocolError(f"{name} has no variant {index}, only 0 to {count - 1}", offset=start)
    return index


def unit_enum_codec(members: Sequence[Any], name: str) -> Codec:
    """Variants without data."""
    prefixes = {member: varint(index) for index, member in enumerate(members)}

    def encode_member(out: bytearray, value: Any, depth: int) -> None:
        try:
            out += prefixes[value]
        except (KeyError, TypeError):
            raise BadValue(f"{value!r} is not a {name}", value) from None

    def decode_member(reader: Reader, depth: int) -> Any:
        return members[_pull_variant(reader, name, len(members))]

    return Codec(encode_member, decode_member, 1)


def enum_codec(variants: Sequence[tuple[type, Codec]], name: str) -> Codec:
    """Variants with data, told apart by the class of the value."""
    by_class = {cls: (varint(index), variant.write) for index, (cls, variant) in enumerate(variants)}
    decoders = [(cls.__name__, variant.read) for cls, variant in variants]

    def encode_variant(out: bytearray, value: Any, depth: int) -> None:
        try:
            prefix, encode_payload = by_class[value.__class__]
        except KeyError:
            raise BadValue(f"{value!r} is not a variant of {name}", value) from None
        out += prefix
        try:
            encode_payload(out, value, depth)
        except BadValue as bad:
            bad.path = step_into(value.__class__.__name__, bad.path)
            raise

    def decode_variant(reader: Reader, depth: int) -> Any:
        variant, decode_payload = decoders[_pull_variant(reader, name, len(decoders))]
        try:
            return decode_payload(reader, depth)
        except ProtocolError as error:
            error.field = step_into(variant, error.field)
            raise

    return Codec(encode_variant, decode_variant, 1 + min(variant.min_size for _, variant in variants))


# -- structs -----------------------------------------------------------------------------------------------------------


def struct_codec(cls: type, fields: Sequence[tuple[str, Codec]], cached: int | bool) -> Codec:
    """The fields of a dataclass in declaration order; ``cached`` as :mod:`.from_annotations` says."""
    names = [name for name, _ in fields]
    encoders = [(name, field.write) for name, field in fields]
    decoders = [field.read for _, field in fields]

    def encode_struct(out: bytearray, value: Any, depth: int) -> None:
        if value.__class__ is not cls:
            raise BadValue(f"{value!r} is not a {cls.__name__}", value)
        name = ""
        try:
            for name, encode_field in encoders:
                encode_field(out, getattr(value, name), depth)
        except BadValue as bad:
            bad.path = step_into(name, bad.path)
            raise

    def encode_cached(out: bytearray, value: Any, depth: int) -> None:
        kept = getattr(value, _CACHE_ATTRIBUTE, None)
        if kept is None:
            fresh = bytearray()
            encode_struct(fresh, value, depth)
            kept = bytes(fresh)
            value.__dict__[_CACHE_ATTRIBUTE] = kept
        out += kept

    def decode_struct(reader: Reader, depth: int) -> Any:
        start = reader.pos
        values: list[Any] = []
        try:
            for decode_field in decoders:
                values.append(decode_field(reader, depth))
        except ProtocolError as error:
            error.field = step_into(names[len(values)], error.field)
            raise
        try:
            return cls(*values)
        except ValueError as error:
            raise ProtocolError(str(error), offset=start) from None

    known = DecodedValues(HEAD if cached is True else cached)

    def decode_cached(reader: Reader, depth: int) -> Any:
        value = known.pull(reader)
        if value is None:
            start, left = reader.pos, reader.peek()
            value = decode_struct(reader, depth)
            known.remember(bytes(left[: reader.pos - start]), value)
        return value

    min_size = sum(field.min_size for _, field in fields)
    return Codec(encode_cached, decode_cached, min_size) if cached else Codec(encode_struct, decode_struct, min_size)


def via_codec(wire: Codec, to_wire: Callable[[Any], Any], from_wire: Callable[[Any], Any]) -> Codec:
    """A value that travels as another type."""
    encode_wire, decode_wire = wire.write, wire.read

    def encode_via(out: bytearray, value: Any, depth: int) -> None:
        encode_wire(out, to_wire(value), depth)

    def decode_via(reader: Reader, depth: int) -> Any:
        start = reader.pos
        wire_value = decode_wire(reader, depth)
        try:
            return from_wire(wire_value)
        except ValueError as error:
            raise ProtocolError(str(error), offset=start) from None

    return Codec(encode_via, decode_via, wire.min_size)


def recursive_codec(resolve: Callable[[], Codec], name: str) -> Codec:
    """A type inside itself: its codec is looked up when first needed, and each step down is counted."""

    def encode_inner(out: bytearray, value: Any, depth: int) -> None:
        if depth >= MAX_NESTING:
            raise BadValue(f"{name} nests deeper than {MAX_NESTING}", None)
        resolve().write(out, value, depth + 1)

    def decode_inner(reader: Reader, depth: int) -> Any:
        if depth >= MAX_NESTING:
            raise LimitExceededError(f"{name} nests deeper than {MAX_NESTING}", offset=reader.pos)
        return resolve().read(reader, depth + 1)

    # A type can hold itself only behind an option, a count or a variant, so one byte is spent a step.
    return Codec(encode_inner, decode_inner, 1)
