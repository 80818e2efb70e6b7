"""How the types of the run state lie in memory: ``repr(C)`` on 64-bit little-endian machines.

Psyche's on-chain coordinator keeps its state in this form (:mod:`.account`). Sizes, alignments and offsets follow from
the same annotations as the wire format:

=======================  ==========================================================================================
declared as              in memory
=======================  ==========================================================================================
integers, floats         their size, aligned to it
``bool``                 one byte
text up to N bytes       N bytes, padded with zeros (``FixedString``)
items up to N            N items, then how many of them count as u64 (``FixedVec``)
N items, N bytes         themselves
unit enum                u32, or the width that :func:`~distro_optim.comm.declarations.raw_width` says
enum with data           u32, then the variants in one place, aligned as the strictest of them
``Option``               a tag as wide as its value's alignment, then the value
struct                   the fields in order, or in that of :func:`~distro_optim.comm.declarations.raw_order`
=======================  ==========================================================================================

Padding, unused slots and the bytes of other variants may hold anything and are not read; they are written as zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

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
    UnitEnumShape,
    ViaShape,
    shape_of,
    step_into,
)
from ...errors import ConfigurationError, LimitExceededError, ProtocolError, TruncatedError

__all__ = ["Layout", "layout_of"]

_TAG: Final = 4  # repr(C) enums: the size of a C int
_LENGTH: Final = 8
_FORMATS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}

Read = Callable[[memoryview, int], Any]  # (memory, offset)
Write = Callable[[bytearray, int, Any], None]  # (memory, offset, value); the memory is zero there


@dataclass(frozen=True)
class Layout:
    """Where one type's bytes are.

    Attributes:
        size: in bytes, padding at the end included.
        align: its address is a multiple of this.
    """

    size: int
    align: int
    _read: Read
    _write: Write

    def read(self, data: bytes | bytearray | memoryview, offset: int = 0) -> Any:
        """The value at ``offset``.

        Raises:
            ProtocolError: the memory is too short, or does not hold such a value.
        """
        view = memoryview(data).cast("B")
        if not 0 <= offset <= len(view) - self.size:
            raise TruncatedError(f"{self.size} bytes are needed, {max(0, len(view) - offset)} are there", offset=offset)
        return self._read(view, offset)

    def write(self, value: Any) -> bytes:
        """The memory that holds ``value``: :attr:`size` bytes.

        Raises:
            ConfigurationError: the value does not fit its declaration.
        """
        memory = bytearray(self.size)
        try:
            self._write(memory, 0, value)
        except struct.error as error:
            raise ConfigurationError(f"a number does not fit its field: {error}", value=value) from None
        return bytes(memory)


def layout_of(declared: Any) -> Layout:
    """The layout of a type.

    Raises:
        TypeError: it has none, such as text without a limit.
    """
    return _layout(shape_of(declared))


def _layout(shape: Shape) -> Layout:
    match shape:
        case IntShape(bits, signed):
            form = _FORMATS[bits // 8]
            return _number(struct.Struct("<" + (form.lower() if signed else form)))
        case FloatShape(bits):
            return _number(struct.Struct("<f" if bits == 32 else "<d"))
        case BoolShape():
            return Layout(1, 1, lambda view, at: view[at] != 0, _write_bool)
        case StrShape(limit) if limit is not None:
            return _text(limit)
        case BytesShape(_, fixed) if fixed is not None:
            return _bytes(fixed)
        case SequenceShape(IntShape(bits, signed), make, _, int(fixed)):
            form = _FORMATS[bits // 8]
            return _numbers(struct.Struct(f"<{fixed}{form.lower() if signed else form}"), bits // 8, make)
        case SequenceShape(item, make, limit, fixed):
            return _sequence(_layout(item), make, limit, fixed)
        case OptionShape(some):
            return _option(_layout(some))
        case UnitEnumShape(cls):
            return _unit_enum(shape, getattr(cls, "__raw_width__", _TAG))
        case EnumShape():
            return _enum(shape)
        case StructShape():
            return _struct(shape)
        case ViaShape(wire, _, _, own):
            # A class with another wire form lies in memory as itself.
            if own is not None:
                return _struct(own)
            return _via(_layout(wire), shape)
        case _:
            raise TypeError(f"{shape} has no fixed size in memory")


def _number(form: struct.Struct) -> Layout:
    return Layout(form.size, form.size, lambda view, at: form.unpack_from(view, at)[0], form.pack_into)


def _numbers(form: struct.Struct, align: int, make: Callable[[list[Any]], Any]) -> Layout:
    """An array, read and written at once: filters are most of what a state consists of."""

    def write_numbers(memory: bytearray, at: int, value: Any) -> None:
        form.pack_into(memory, at, *value)

    return Layout(form.size, align, lambda view, at: make(list(form.unpack_from(view, at))), write_numbers)


def _write_bool(memory: bytearray, at: int, value: Any) -> None:
    memory[at] = 1 if value else 0


def _text(size: int) -> Layout:
    def write_text(memory: bytearray, at: int, value: Any) -> None:
        data = value.encode(errors="surrogateescape")
        if len(data) > size:
            raise ConfigurationError(f"{value!r} has {len(data)} bytes, but room is for {size}", value=value)
        memory[at : at + len(data)] = data

    return Layout(
        size, 1, lambda view, at: bytes(view[at : at + size]).decode(errors="replace").strip("\0"), write_text
    )


def _bytes(size: int) -> Layout:
    def write_bytes(memory: bytearray, at: int, value: Any) -> None:
        if len(value) != size:
            raise ConfigurationError(f"{size} bytes are needed, not {len(value)}", value=value)
        memory[at : at + size] = value

    return Layout(size, 1, lambda view, at: bytes(view[at : at + size]), write_bytes)


def _via(inner: Layout, shape: ViaShape) -> Layout:
    def write_via(memory: bytearray, at: int, value: Any) -> None:
        inner._write(memory, at, shape.to_wire(value))

    return Layout(inner.size, inner.align, lambda view, at: shape.from_wire(inner._read(view, at)), write_via)


def _sequence(item: Layout, make: Callable[[list[Any]], Any], limit: int | None, fixed: int | None) -> Layout:
    slots = fixed if fixed is not None else limit
    if slots is None:
        raise TypeError("a sequence without a limit has no fixed size in memory")

    def write_items(memory: bytearray, at: int, value: Any) -> None:
        if len(value) > slots or (fixed is not None and len(value) != fixed):
            raise ConfigurationError(f"{len(value)} items do not fit in {slots} slots", value=value)
        for index, one in enumerate(value):
            item._write(memory, at + index * item.size, one)

    if fixed is not None:
        return Layout(
            slots * item.size, item.align, lambda view, at: make(_read_items(item, view, at, slots)), write_items
        )

    length_at = _round_up(slots * item.size, _LENGTH)

    def read_counted(view: memoryview, at: int) -> Any:
        count = int.from_bytes(view[at + length_at : at + length_at + _LENGTH], "little")
        if count > slots:
            raise LimitExceededError(f"{count} items are announced, at most {slots} have room", offset=at + length_at)
        return make(_read_items(item, view, at, count))

    def write_counted(memory: bytearray, at: int, value: Any) -> None:
        write_items(memory, at, value)
        memory[at + length_at : at + length_at + _LENGTH] = len(value).to_bytes(_LENGTH, "little")

    return Layout(length_at + _LENGTH, max(item.align, _LENGTH), read_counted, write_counted)


def _read_items(item: Layout, view: memoryview, at: int, count: int) -> list[Any]:
    return [_inside(f"[{index}]", item, view, at + index * item.size) for index in range(count)]


def _option(some: Layout) -> Layout:
    tag = some.align

    def read_option(view: memoryview, at: int) -> Any:
        given = int.from_bytes(view[at : at + tag], "little")
        if given > 1:
            raise ProtocolError(f"an option begins with 0 or 1, not {given}", offset=at)
        return some._read(view, at + tag) if given else None

    def write_option(memory: bytearray, at: int, value: Any) -> None:
        if value is not None:
            memory[at] = 1
            some._write(memory, at + tag, value)

    return Layout(_round_up(tag + some.size, some.align), some.align, read_option, write_option)


def _unit_enum(shape: UnitEnumShape, width: int) -> Layout:
    members = shape.members

    def read_member(view: memoryview, at: int) -> Any:
        return members[_tag(view, at, width, shape.cls.__name__, len(members))]

    def write_member(memory: bytearray, at: int, value: Any) -> None:
        memory[at] = members.index(value)

    return Layout(width, width, read_member, write_member)


def _enum(shape: EnumShape) -> Layout:
    variants = [(variant.name, _layout(variant.shape)) for variant in shape.variants]
    classes = [variant.cls for variant in shape.variants]
    align = max(_TAG, *(layout.align for _, layout in variants))
    payload_at = _round_up(_TAG, align)

    def read_variant(view: memoryview, at: int) -> Any:
        name, layout = variants[_tag(view, at, _TAG, shape.name, len(variants))]
        return _inside(name, layout, view, at + payload_at)

    def write_variant(memory: bytearray, at: int, value: Any) -> None:
        if type(value) not in classes:
            raise ConfigurationError(f"{value!r} is not a variant of {shape.name}", value=value)
        memory[at] = number = classes.index(type(value))
        variants[number][1]._write(memory, at + payload_at, value)

    size = max(layout.size for _, layout in variants)
    return Layout(_round_up(payload_at + size, align), align, read_variant, write_variant)


def _tag(view: memoryview, at: int, width: int, name: str, count: int) -> int:
    tag = int.from_bytes(view[at : at + width], "little")
    if tag >= count:
        raise ProtocolError(f"{name} has no variant {tag}, only 0 to {count - 1}", offset=at)
    return tag


def _struct(shape: StructShape) -> Layout:
    layouts = {field.name: _layout(inner) for field, inner in shape.fields}
    offsets: dict[str, int] = {}
    end, align = 0, 1
    for name in getattr(shape.cls, "__raw_order__", layouts):
        layout = layouts[name]
        offsets[name] = _round_up(end, layout.align)
        end = offsets[name] + layout.size
        align = max(align, layout.align)

    def read_struct(view: memoryview, at: int) -> Any:
        values = [_inside(name, layout, view, at + offsets[name]) for name, layout in layouts.items()]
        try:
            return shape.cls(*values)
        except ValueError as error:
            raise ProtocolError(str(error), offset=at) from None

    def write_struct(memory: bytearray, at: int, value: Any) -> None:
        for name, layout in layouts.items():
            layout._write(memory, at + offsets[name], getattr(value, name))

    return Layout(_round_up(end, align), align, read_struct, write_struct)


def _round_up(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _inside(name: str, layout: Layout, view: memoryview, at: int) -> Any:
    """Reads a part; an error inside it gets its name in front."""
    try:
        return layout._read(view, at)
    except ProtocolError as error:
        error.field = step_into(name, error.field)
        raise
