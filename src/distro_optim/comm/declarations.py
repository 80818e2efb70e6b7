"""What the annotations of a message class say about its bytes, read once for every format.

A field is declared once, such as ``clients: Annotated[tuple[Client, ...], Limit(256)]``. :func:`shape_of` turns the
annotation into a :data:`Shape`, and each format (:mod:`.postcard`, the text form and the account layout of the
coordinator) makes its encoder from that. The table of annotations is in :mod:`.postcard`.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, TypeVar

__all__ = [
    "BoolShape",
    "BytesShape",
    "EnumShape",
    "Fixed",
    "Float",
    "FloatShape",
    "Int",
    "IntShape",
    "Limit",
    "MapShape",
    "NothingShape",
    "OnlyVariant",
    "OptionShape",
    "SequenceShape",
    "Shape",
    "StrShape",
    "StructShape",
    "TupleShape",
    "UnitEnumShape",
    "Variant",
    "Via",
    "ViaShape",
    "newtype",
    "raw_order",
    "raw_width",
    "shape_of",
    "step_into",
    "variant",
]

T = TypeVar("T")


# -- marks inside Annotated --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int:
    """An integer of ``bits`` bits."""

    bits: int
    signed: bool = False


@dataclass(frozen=True)
class Float:
    """An IEEE 754 number of ``bits`` bits."""

    bits: int


@dataclass(frozen=True)
class Limit:
    """At most ``count`` items, or bytes of a ``str`` or ``bytes``."""

    count: int


@dataclass(frozen=True)
class Fixed:
    """Exactly ``count`` items or bytes, and no count on the wire."""

    count: int


@dataclass(frozen=True)
class OnlyVariant:
    """A Rust enum with this one variant; a Python union of one does not exist."""


@dataclass(frozen=True)
class Via:
    """Travels as another type.

    Args:
        wire: the type that is written.
        to_wire: value -> wire value.
        from_wire: wire value -> value; may raise ValueError or ProtocolError.
    """

    wire: Any
    to_wire: Callable[[Any], Any]
    from_wire: Callable[[Any], Any]


# -- marks on classes --------------------------------------------------------------------------------------------------


def newtype(cls: type[T]) -> type[T]:
    """A Rust newtype: in text the one field stands for the whole. (In postcard it does so anyway.)"""
    cls.__newtype__ = True  # type: ignore[attr-defined]
    return cls


def variant(name: str) -> Callable[[type[T]], type[T]]:
    """The name of an enum's variant in text, where it is not that of the class."""

    def mark(cls: type[T]) -> type[T]:
        cls.__variant__ = name  # type: ignore[attr-defined]
        return cls

    return mark


def raw_order(*names: str) -> Callable[[type[T]], type[T]]:
    """The order of the fields in memory, where Rust's compiler chose one of its own (no ``repr(C)``)."""

    def mark(cls: type[T]) -> type[T]:
        cls.__raw_order__ = names  # type: ignore[attr-defined]
        return cls

    return mark


def raw_width(size: int) -> Callable[[type[T]], type[T]]:
    """Bytes of a unit enum in memory: 4 (``repr(C)``) unless said otherwise."""

    def mark(cls: type[T]) -> type[T]:
        cls.__raw_width__ = size  # type: ignore[attr-defined]
        return cls

    return mark


# -- shapes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NothingShape:
    """``None``."""


@dataclass(frozen=True)
class BoolShape:
    """``bool``."""


@dataclass(frozen=True)
class IntShape:
    """An integer of ``bits`` bits."""

    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """The smallest value."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def name(self) -> str:
        """As Rust calls it."""
        return f"{'i' if self.signed else 'u'}{self.bits}"


@dataclass(frozen=True)
class FloatShape:
    """A float of ``bits`` bits."""

    bits: int


@dataclass(frozen=True)
class StrShape:
    """UTF-8 text of up to ``limit`` bytes."""

    limit: int | None


@dataclass(frozen=True)
class BytesShape:
    """``fixed`` bytes without a length, or up to ``limit``."""

    limit: int | None
    fixed: int | None


@dataclass(frozen=True)
class SequenceShape:
    """``fixed`` items without a count, or up to ``limit``; ``make`` turns the list of them into the value."""

    item: Shape
    make: Callable[[list[Any]], Any]
    limit: int | None
    fixed: int | None


@dataclass(frozen=True)
class TupleShape:
    """Parts of their own types, in order."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class MapShape:
    """Up to ``limit`` keys and values."""

    key: Shape
    value: Shape
    limit: int | None


@dataclass(frozen=True)
class OptionShape:
    """A value or ``None``."""

    some: Shape


@dataclass(frozen=True)
class UnitEnumShape:
    """An :class:`enum.Enum`: variants without data."""

    cls: type[enum.Enum]

    @property
    def members(self) -> list[enum.Enum]:
        """The variants in the order of their numbers."""
        return list(self.cls)


@dataclass(frozen=True)
class Variant:
    """One variant of an enum: its class tells values apart, its name is used in text."""

    cls: type
    name: str
    shape: Shape


@dataclass(frozen=True)
class EnumShape:
    """A union of dataclasses: variants with data."""

    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """The names of the variants' classes, for errors."""
        return " | ".join(variant.cls.__name__ for variant in self.variants)


@dataclass(frozen=True)
class StructShape:
    """A dataclass.

    Attributes:
        cls: the class.
        arguments: what its type parameters stand for.
    """

    cls: type
    arguments: tuple[Any, ...]

    @cached_property
    def fields(self) -> tuple[tuple[dataclasses.Field[Any], Shape], ...]:
        """Read when first asked for, since a class may hold itself."""
        variables = dict(zip(getattr(self.cls, "__parameters__", ()), self.arguments, strict=True))
        hints = typing.get_type_hints(self.cls, include_extras=True)
        return tuple((field, shape_of(hints[field.name], variables)) for field in dataclasses.fields(self.cls))


@dataclass(frozen=True)
class ViaShape:
    """A value that travels as ``wire``; ``own`` are the fields of its class where the class said so itself."""

    wire: Shape
    to_wire: Callable[[Any], Any]
    from_wire: Callable[[Any], Any]
    own: StructShape | None


Shape = (
    NothingShape
    | BoolShape
    | IntShape
    | FloatShape
    | StrShape
    | BytesShape
    | SequenceShape
    | TupleShape
    | MapShape
    | OptionShape
    | UnitEnumShape
    | EnumShape
    | StructShape
    | ViaShape
)


# -- paths -------------------------------------------------------------------------------------------------------------


def step_into(name: str, field: str | None) -> str:
    """The path of ``field`` seen from one level further out: ("clients", "[3].id") -> "clients[3].id"."""
    if not field:
        return name
    return f"{name}{field}" if field.startswith("[") else f"{name}.{field}"


# -- from annotations to shapes ----------------------------------------------------------------------------------------


def shape_of(declared: Any, variables: dict[Any, Any] | None = None) -> Shape:
    """Reads one annotation.

    Args:
        declared: the annotation.
        variables: what the type variables of the generic class around it stand for.

    Raises:
        TypeError: it says nothing about bytes, such as a bare ``int``.
    """
    variables = variables or {}
    marks: list[Any] = []
    if typing.get_origin(declared) is Annotated:
        declared, *marks = typing.get_args(declared)
    if isinstance(declared, TypeVar):
        return shape_of(variables[declared])

    for mark in marks:
        if isinstance(mark, Via):
            return ViaShape(shape_of(mark.wire, variables), mark.to_wire, mark.from_wire, None)
        if isinstance(mark, Int):
            return IntShape(mark.bits, mark.signed)
        if isinstance(mark, Float):
            return FloatShape(mark.bits)
        if isinstance(mark, OnlyVariant):
            return EnumShape((_variant(declared, variables),))
    limit = next((mark.count for mark in marks if isinstance(mark, Limit)), None)
    fixed = next((mark.count for mark in marks if isinstance(mark, Fixed)), None)

    if declared is bool:
        return BoolShape()
    if declared is None or declared is types.NoneType:
        return NothingShape()
    if declared is str:
        return StrShape(limit)
    if declared is bytes:
        return BytesShape(limit, fixed)
    origin = typing.get_origin(declared)
    if origin in (types.UnionType, typing.Union):
        return _union(declared, variables)
    if origin in (list, tuple, dict):
        return _collection(declared, origin, variables, limit, fixed)
    if isinstance(declared, type) and issubclass(declared, enum.Enum):
        return _unit_enum(declared)
    return _class(declared, variables)


def _union(declared: Any, variables: dict[Any, Any]) -> Shape:
    parts = typing.get_args(declared)
    some = [part for part in parts if part is not types.NoneType]
    if len(some) == 1:
        return OptionShape(shape_of(some[0], variables))
    choice = EnumShape(tuple(_variant(part, variables) for part in some))
    if len({variant.cls for variant in choice.variants}) != len(some):
        raise TypeError(f"{declared}: each variant needs a class of its own")
    return OptionShape(choice) if len(some) < len(parts) else choice


def _variant(declared: Any, variables: dict[Any, Any]) -> Variant:
    cls = typing.get_origin(declared) or declared
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"{declared!r} is not a dataclass, as the variants of an enum with data have to be")
    return Variant(cls, getattr(cls, "__variant__", cls.__name__), shape_of(declared, variables))


def _collection(declared: Any, origin: Any, variables: dict[Any, Any], limit: int | None, fixed: int | None) -> Shape:
    arguments = typing.get_args(declared)
    parts = [shape_of(part, variables) for part in arguments if part is not Ellipsis]
    if origin is dict:
        return MapShape(parts[0], parts[1], limit)
    if origin is tuple and Ellipsis not in arguments:
        return TupleShape(tuple(parts))
    return SequenceShape(parts[0], tuple if origin is tuple else list, limit, fixed)


def _unit_enum(declared: type[enum.Enum]) -> Shape:
    for position, member in enumerate(declared):
        # An integer enumeration reads as if its numbers were the wire's; then they have to be.
        if isinstance(member, int) and member != position:
            raise TypeError(f"{declared.__name__}.{member.name} is {int(member)} but stands at position {position}")
    return UnitEnumShape(declared)


def _class(declared: Any, variables: dict[Any, Any]) -> Shape:
    cls = typing.get_origin(declared) or declared
    if not isinstance(cls, type):
        raise TypeError(f"{declared!r} is not a declaration of a message")
    if not dataclasses.is_dataclass(cls):
        advice = "; declare its width, such as U64 or F32" if cls in (int, float) else ""
        raise TypeError(f"{cls.__name__} is not a declaration of a message{advice}")
    struct = StructShape(cls, tuple(variables.get(argument, argument) for argument in typing.get_args(declared)))
    via = cls.__dict__.get("__postcard__")
    if via is None:
        return struct
    return ViaShape(shape_of(via.wire), via.to_wire, via.from_wire, struct)
