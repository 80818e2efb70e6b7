"""serde's postcard format, from the type annotations of dataclasses.

A message is declared once, as a dataclass whose annotations are its wire types; encoder and decoder are compiled
from it at first use::

    @dataclass(frozen=True)
    class TrainingResult:
        batch_id: BatchId
        ticket: BlobTicket


    @dataclass(frozen=True)
    class Finished:
        broadcast_merkle: Annotated[bytes, Fixed(32)]
        warmup: bool


    BroadcastType = TrainingResult | Finished  # a Rust enum: the variants in declaration order

========================================  =======================================================================
annotation                                bytes
========================================  =======================================================================
``U8 I8 bool``                            one byte
``U16 U32 U64 USIZE``                     LEB128 varint
``I16 I32 I64``                           zigzag, then varint
``F32 F64``                               4 / 8 bytes little endian
``str``, ``bytes``                        varint length, then the bytes; ``Annotated[str, Limit(64)]`` bounds it
``Annotated[bytes, Fixed(32)]``           ``[u8; 32]``: the bytes alone
``list[T]``, ``tuple[T, ...]``            varint count, then the items; ``Annotated[list[T], Limit(8)]`` bounds it
``Annotated[tuple[T, ...], Fixed(8)]``    ``[T; 8]``: the items alone
``tuple[A, B]``, dataclass                the parts in order, no header (a newtype is a dataclass with one field)
``dict[K, V]``                            varint count, then keys and values in turn
``T | None``                              ``Option``: 00, or 01 and the value
``A | B``, :class:`enum.Enum`             varint of the variant's zero-based position, then the variant
``Ok[T] | Err[E]``                        ``Result``
``None``                                  nothing
``Annotated[X, Via(W, to_wire, ...)]``    as the wire type ``W`` of it (or ``__postcard__ = Via(...)`` in the class)
========================================  =======================================================================

Python flattens unions: an enum inside an enum must be a field of a variant. ``A | B`` and ``B | A`` are equal to
Python although they differ on the wire; where both were needed, give each its own variant classes.

A class with ``__postcard_cached__ = True`` keeps its bytes once encoded. It must be frozen, and have no slots.

Decoders raise only :class:`~distro_optim.errors.ProtocolError`, with the path of the field and the offset.
Declared lengths are compared with what is left before anything is allocated, and recursive types nest at most
:data:`MAX_NESTING` deep.

Format: https://postcard.jamesmunns.com/wire-format
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar, overload

from ..buffer import Reader, Writer
from ._postcard_codecs import (
    BOOL,
    MAX_NESTING,
    NOTHING,
    Codec,
    array_codec,
    blob_codec,
    enum_codec,
    float_codec,
    int_codec,
    map_codec,
    option_codec,
    raw_codec,
    recursive_codec,
    sequence_codec,
    str_codec,
    struct_codec,
    tuple_codec,
    unit_enum_codec,
    via_codec,
)

__all__ = [
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "MAX_NESTING",
    "U8",
    "U16",
    "U32",
    "U64",
    "USIZE",
    "Bytes32",
    "Bytes64",
    "Codec",
    "Err",
    "Fixed",
    "Float",
    "Int",
    "Limit",
    "Ok",
    "Via",
    "codec",
    "decode",
    "encode",
    "pull",
    "push",
]

T = TypeVar("T")
E = TypeVar("E")


# -- what an annotation can say ------------------------------------------------------------------------------------


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


U8 = Annotated[int, Int(8)]
U16 = Annotated[int, Int(16)]
U32 = Annotated[int, Int(32)]
U64 = Annotated[int, Int(64)]
USIZE = U64
I8 = Annotated[int, Int(8, signed=True)]
I16 = Annotated[int, Int(16, signed=True)]
I32 = Annotated[int, Int(32, signed=True)]
I64 = Annotated[int, Int(64, signed=True)]
F32 = Annotated[float, Float(32)]
F64 = Annotated[float, Float(64)]
Bytes32 = Annotated[bytes, Fixed(32)]
Bytes64 = Annotated[bytes, Fixed(64)]


@dataclass(frozen=True)
class Ok(Generic[T]):
    """The first variant of a Rust ``Result``."""

    value: T


@dataclass(frozen=True)
class Err(Generic[E]):
    """The second variant of a Rust ``Result``."""

    error: E


# -- the public verbs ----------------------------------------------------------------------------------------------


def encode(value: Any, type: Any = None) -> bytes:
    """The bytes of ``value``.

    Args:
        value: an instance of ``type``.
        type: its declaration; by default the class of ``value``, which does for dataclasses.

    Raises:
        ConfigurationError: a value does not fit its declaration; ``name`` is the path of the field.
    """
    return codec(value.__class__ if type is None else type).encode(value)


@overload
def decode(type: type[T], data: bytes | bytearray | memoryview, *, allow_trailing: bool = False) -> T: ...
@overload
def decode(type: Any, data: bytes | bytearray | memoryview, *, allow_trailing: bool = False) -> Any: ...
def decode(type: Any, data: bytes | bytearray | memoryview, *, allow_trailing: bool = False) -> Any:
    """The value that ``data`` holds.

    Args:
        type: its declaration.
        data: the bytes.
        allow_trailing: ignore bytes after the value, as Rust's ``postcard::from_bytes`` does.

    Raises:
        ProtocolError: whatever is wrong with the bytes.
    """
    return codec(type).decode(data, allow_trailing=allow_trailing)


def push(writer: Writer, value: Any, type: Any = None) -> None:
    """Appends the bytes of ``value`` to ``writer``; see :func:`encode`."""
    codec(value.__class__ if type is None else type).push(writer, value)


@overload
def pull(reader: Reader, type: type[T]) -> T: ...
@overload
def pull(reader: Reader, type: Any) -> Any: ...
def pull(reader: Reader, type: Any) -> Any:
    """Takes a value off the front of ``reader``; see :func:`decode`."""
    return codec(type).pull(reader)


# Keyed by identity, because `A | B == B | A`. The declaration is kept beside its codec so that its id stays taken.
_COMPILED: dict[int, tuple[Any, Codec]] = {}
_MAX_COMPILED: Final = 4096  # declarations are few; this only bounds what types made on the fly can cost


def codec(type: Any) -> Codec:
    """The compiled form of a declaration.

    Raises:
        TypeError: the declaration is not one of those in the table above.
    """
    found = _COMPILED.get(id(type))
    if found is not None:
        return found[1]
    made = _compile(type, {}, {})
    if len(_COMPILED) >= _MAX_COMPILED:
        _COMPILED.clear()
    _COMPILED[id(type)] = (type, made)
    return made


# -- from annotations to codecs ------------------------------------------------------------------------------------


def _compile(declared: Any, variables: dict[Any, Any], open_classes: dict[Any, list[Codec]]) -> Codec:
    """The codec of one annotation.

    Args:
        declared: the annotation.
        variables: what the type variables of the generic class around it stand for.
        open_classes: the classes being compiled further out, each with room for its codec once that is there.
    """
    marks: tuple[Any, ...] = ()
    origin = typing.get_origin(declared)
    if origin is Annotated:
        declared, *rest = typing.get_args(declared)
        marks = tuple(rest)
        origin = typing.get_origin(declared)
    if isinstance(declared, TypeVar):
        return _compile(variables[declared], {}, open_classes)

    for mark in marks:
        if isinstance(mark, Via):
            return via_codec(_compile(mark.wire, variables, open_classes), mark.to_wire, mark.from_wire)
        if isinstance(mark, Int):
            return int_codec(mark.bits, mark.signed)
        if isinstance(mark, Float):
            return float_codec(mark.bits)
    limit = next((mark.count for mark in marks if isinstance(mark, Limit)), None)
    fixed = next((mark.count for mark in marks if isinstance(mark, Fixed)), None)

    if declared is bool:
        return BOOL
    if declared is None or declared is types.NoneType:
        return NOTHING
    if declared is str:
        return str_codec(limit)
    if declared is bytes:
        return blob_codec(limit) if fixed is None else raw_codec(fixed)
    if origin in (types.UnionType, typing.Union):
        return _compile_union(declared, variables, open_classes)
    if origin in (list, tuple, dict):
        parts = [part for part in typing.get_args(declared) if part is not Ellipsis]
        codecs = [_compile(part, variables, open_classes) for part in parts]
        if origin is dict:
            return map_codec(codecs[0], codecs[1], limit, repr(declared))
        if origin is tuple and Ellipsis not in typing.get_args(declared):
            return tuple_codec(codecs)
        make: Callable[[list[Any]], Any] = tuple if origin is tuple else list
        if fixed is not None:
            return array_codec(codecs[0], make, fixed)
        return sequence_codec(codecs[0], make, limit, repr(declared))
    if isinstance(declared, type) and issubclass(declared, enum.Enum):
        return _compile_unit_enum(declared)
    return _compile_class(declared, variables, open_classes)


def _compile_union(declared: Any, variables: dict[Any, Any], open_classes: dict[Any, list[Codec]]) -> Codec:
    variants = [part for part in typing.get_args(declared) if part is not types.NoneType]
    codecs = [_compile(part, variables, open_classes) for part in variants]
    if len(variants) == 1:
        return option_codec(codecs[0])
    classes = [typing.get_origin(part) or part for part in variants]
    if not all(isinstance(cls, type) and dataclasses.is_dataclass(cls) for cls in classes):
        raise TypeError(f"{declared}: the variants of an enum with data are dataclasses")
    name = " | ".join(cls.__name__ for cls in classes)
    choice = enum_codec(list(zip(classes, codecs, strict=True)), name)
    return option_codec(choice) if len(variants) < len(typing.get_args(declared)) else choice


def _compile_unit_enum(declared: type[enum.Enum]) -> Codec:
    members = list(declared)
    for position, member in enumerate(members):
        # An integer enumeration reads as if its numbers were the wire's; then they have to be.
        if isinstance(member, int) and member != position:
            raise TypeError(f"{declared.__name__}.{member.name} is {int(member)} but stands at position {position}")
    return unit_enum_codec(members, declared.__name__)


def _compile_class(declared: Any, variables: dict[Any, Any], open_classes: dict[Any, list[Codec]]) -> Codec:
    cls = typing.get_origin(declared) or declared
    if not isinstance(cls, type):
        raise TypeError(f"{declared!r} is no postcard declaration")
    via = cls.__dict__.get("__postcard__")
    if via is not None:
        return via_codec(_compile(via.wire, {}, open_classes), via.to_wire, via.from_wire)
    if not dataclasses.is_dataclass(cls):
        advice = "; declare its width, such as U64 or F32" if cls in (int, float) else ""
        raise TypeError(f"{cls.__name__} is no postcard declaration{advice}")
    if declared in open_classes:
        room = open_classes[declared]
        return recursive_codec(lambda: room[0], cls.__name__)

    arguments = tuple(variables.get(argument, argument) for argument in typing.get_args(declared))
    inner = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=True)) if arguments else {}
    open_classes = {**open_classes, declared: []}
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [(field.name, _compile(hints[field.name], inner, open_classes)) for field in dataclasses.fields(cls)]
    made = struct_codec(cls, fields, cached=cls.__dict__.get("__postcard_cached__", False))
    open_classes[declared].append(made)
    return made
