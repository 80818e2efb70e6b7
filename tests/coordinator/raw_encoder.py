"""Writes values as ``repr(C)`` keeps them in memory, for tests of :mod:`distro_optim.coordinator.formats.raw`.

It shares the declarations with the reader and computes sizes and offsets by itself, so that a mistake in the reader's
arithmetic does not cancel out. Padding and unused slots are zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from distro_optim.comm.declarations import (
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
)

ENUM_TAG = 4
LENGTH = 8


def raw_bytes(declared: Any, value: Any) -> bytes:
    """``value`` as it lies in memory."""
    shape = shape_of(declared)
    data = bytearray(_measure(shape)[0])
    _put(shape, value, data, 0)
    return bytes(data)


def _up(offset: int, align: int) -> int:
    return (offset + align - 1) // align * align


def _slots(shape: SequenceShape) -> int:
    count = shape.limit if shape.fixed is None else shape.fixed
    assert count is not None
    return count


def _places(shape: StructShape) -> Iterator[tuple[str, Shape, int]]:
    """Name, shape and offset of each field, in the order of memory."""
    shapes = {field.name: inner for field, inner in shape.fields}
    end = 0
    for name in getattr(shape.cls, "__raw_order__", tuple(shapes)):
        size, align = _measure(shapes[name])
        at = _up(end, align)
        yield name, shapes[name], at
        end = at + size


def _measure(shape: Shape) -> tuple[int, int]:
    """Size and alignment in bytes."""
    match shape:
        case IntShape(bits, _) | FloatShape(bits):
            return bits // 8, bits // 8
        case BoolShape():
            return 1, 1
        case StrShape(int(limit)):
            return limit, 1
        case BytesShape(_, int(fixed)):
            return fixed, 1
        case SequenceShape(item, _, _, fixed):
            size, align = _measure(item)
            whole = size * _slots(shape)
            return (whole, align) if fixed is not None else (_up(whole, LENGTH) + LENGTH, max(align, LENGTH))
        case OptionShape(some):
            size, align = _measure(some)
            return _up(align + size, align), align
        case UnitEnumShape(cls):
            width = getattr(cls, "__raw_width__", ENUM_TAG)
            return width, width
        case EnumShape(variants):
            parts = [_measure(variant.shape) for variant in variants]
            align = max(ENUM_TAG, *(align for _, align in parts))
            return _up(_up(ENUM_TAG, align) + max(size for size, _ in parts), align), align
        case StructShape():
            end, strictest = 0, 1
            for _, inner, at in _places(shape):
                size, align = _measure(inner)
                end, strictest = at + size, max(strictest, align)
            return _up(end, strictest), strictest
        case ViaShape(wire, _, _, own):
            return _measure(wire if own is None else own)
    raise TypeError(f"{shape} has no fixed size in memory")


def _put(shape: Shape, value: Any, data: bytearray, at: int) -> None:
    match shape:
        case IntShape(bits, signed):
            data[at : at + bits // 8] = value.to_bytes(bits // 8, "little", signed=signed)
        case FloatShape(bits):
            struct.pack_into("<f" if bits == 32 else "<d", data, at, value)
        case BoolShape():
            data[at] = value
        case StrShape(int(limit)):
            text = value.encode()
            assert len(text) <= limit
            data[at : at + len(text)] = text
        case BytesShape(_, int(fixed)):
            assert len(value) == fixed
            data[at : at + fixed] = value
        case SequenceShape(item, _, _, fixed):
            size, _ = _measure(item)
            for index, part in enumerate(value):
                _put(item, part, data, at + index * size)
            if fixed is None:
                counted_at = at + _up(size * _slots(shape), LENGTH)
                data[counted_at : counted_at + LENGTH] = len(value).to_bytes(LENGTH, "little")
        case OptionShape(some):
            if value is not None:
                data[at] = 1
                _put(some, value, data, at + _measure(some)[1])
        case UnitEnumShape():
            width = _measure(shape)[0]
            data[at : at + width] = shape.members.index(value).to_bytes(width, "little")
        case EnumShape(variants):
            number = [variant.cls for variant in variants].index(type(value))
            data[at : at + ENUM_TAG] = number.to_bytes(ENUM_TAG, "little")
            _put(variants[number].shape, value, data, at + _up(ENUM_TAG, _measure(shape)[1]))
        case StructShape():
            for name, inner, offset in _places(shape):
                _put(inner, getattr(value, name), data, at + offset)
        case ViaShape(wire, to_wire, _, own):
            if own is None:
                _put(wire, to_wire(value), data, at)
            else:
                _put(own, value, data, at)
        case _:
            raise TypeError(f"{shape} has no fixed size in memory")
