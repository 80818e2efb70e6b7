"""How the types of the run state lie in memory: ``repr(C)`` on 64-bit little-endian machines, for reading.

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

Padding, unused slots and the bytes of other variants may hold anything and are not read.
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
from ...errors import LimitExceededError, ProtocolError, TruncatedError

__all__ = ["Layout", "layout_of"]

_TAG: Final = 4  # repr(C) enums: the size of a C int
_LENGTH: Final = 8
_FORMATS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}

Read = Callable[[memoryview, int], Any]  # (memory, offset)


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

    def read(self, data: bytes | bytearray | memoryview, offset: int = 0) -> Any:
        """The value at ``offset``.

        Raises:
            ProtocolError: the memory is too short, or does not hold such a value.
        """
        view = memoryview(data).cast("B")
        if not 0 <= offset <= len(view) - self.size:
            raise TruncatedError(f"{self.size} bytes are needed, {max(0, len(view) - offset)} are there", offset=offset)
        return self._read(view, offset)


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
            return Layout(1, 1, lambda view, at: view[at] != 0)
        case StrShape(limit) if limit is not None:
            return _text(limit)
        case BytesShape(_, fixed) if fixed is not None:
            return _bytes(fixed)
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
        case ViaShape(wire, _, from_wire, own):
            # A class with another wire form lies in memory as itself.
            if own is not None:
                return _struct(own)
            inner = _layout(wire)
            return Layout(inner.size, inner.align, lambda view, at: from_wire(inner._read(view, at)))
        case _:
            raise TypeError(f"{shape} has no fixed size in memory")


def _number(form: struct.Struct) -> Layout:
    return Layout(form.size, form.size, lambda view, at: form.unpack_from(view, at)[0])


def _text(size: int) -> Layout:
    return Layout(size, 1, lambda view, at: bytes(view[at : at + size]).decode(errors="replace").strip("\0"))


def _bytes(size: int) -> Layout:
    return Layout(size, 1, lambda view, at: bytes(view[at : at + size]))


def _sequence(item: Layout, make: Callable[[list[Any]], Any], limit: int | None, fixed: int | None) -> Layout:
    slots = fixed if fixed is not None else limit
    if slots is None:
        raise TypeError("a sequence without a limit has no fixed size in memory")
    if fixed is not None:
        return Layout(slots * item.size, item.align, lambda view, at: make(_read_items(item, view, at, slots)))

    length_at = _round_up(slots * item.size, _LENGTH)

    def read_counted(view: memoryview, at: int) -> Any:
        count = int.from_bytes(view[at + length_at : at + length_at + _LENGTH], "little")
        if count > slots:
            raise LimitExceededError(f"{count} items are announced, at most {slots} have room", offset=at + length_at)
        return make(_read_items(item, view, at, count))

    return Layout(length_at + _LENGTH, max(item.align, _LENGTH), read_counted)


def _read_items(item: Layout, view: memoryview, at: int, count: int) -> list[Any]:
    return [_inside(f"[{index}]", item, view, at + index * item.size) for index in range(count)]


def _option(some: Layout) -> Layout:
    tag = some.align

    def read_option(view: memoryview, at: int) -> Any:
        given = int.from_bytes(view[at : at + tag], "little")
        if given > 1:
            raise ProtocolError(f"an option begins with 0 or 1, not {given}", offset=at)
        return some._read(view, at + tag) if given else None

    return Layout(_round_up(tag + some.size, some.align), some.align, read_option)


def _unit_enum(shape: UnitEnumShape, width: int) -> Layout:
    members = shape.members

    def read_member(view: memoryview, at: int) -> Any:
        return members[_tag(view, at, width, shape.cls.__name__, len(members))]

    return Layout(width, width, read_member)


def _enum(shape: EnumShape) -> Layout:
    variants = [(variant.name, _layout(variant.shape)) for variant in shape.variants]
    align = max(_TAG, *(layout.align for _, layout in variants))
    payload_at = _round_up(_TAG, align)

    def read_variant(view: memoryview, at: int) -> Any:
        name, layout = variants[_tag(view, at, _TAG, shape.name, len(variants))]
        return _inside(name, layout, view, at + payload_at)

    size = max(layout.size for _, layout in variants)
    return Layout(_round_up(payload_at + size, align), align, read_variant)


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

    return Layout(_round_up(end, align), align, read_struct)


def _round_up(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _inside(name: str, layout: Layout, view: memoryview, at: int) -> Any:
    """Reads a part; an error inside it gets its name in front."""
    try:
        return layout._read(view, at)
    except ProtocolError as error:
        error.field = step_into(name, error.field)
        raise
