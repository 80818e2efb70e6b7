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
``Annotated[A, OnlyVariant()]``           an enum with the one variant ``A``
``None``                                  nothing
``Annotated[X, Via(W, to_wire, ...)]``    as the wire type ``W`` of it (or ``__postcard__ = Via(...)`` in the class)
========================================  =======================================================================

Python flattens unions: an enum inside an enum must be a field of a variant. ``A | B`` and ``B | A`` are equal to
Python although they differ on the wire; where both were needed, give each its own variant classes.

A class with ``__postcard_cached__ = True`` keeps its bytes once encoded, and of its latest values those that come again
byte by byte are decoded once; a number in place of True says by how many of their first bytes its values are told
apart. It must be frozen, and have no slots.

Decoders raise only :class:`~distro_optim.errors.ProtocolError`, with the path of the field and the offset.
Declared lengths are compared with what is left before anything is allocated, and recursive types nest at most
:data:`MAX_NESTING` deep.

Format: https://postcard.jamesmunns.com/wire-format
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar, overload

from ...buffer import Reader, Writer
from ..declarations import (
    BoolShape,
    BytesShape,
    EnumShape,
    Fixed,
    Float,
    FloatShape,
    Int,
    IntShape,
    Limit,
    MapShape,
    NothingShape,
    OnlyVariant,
    OptionShape,
    SequenceShape,
    Shape,
    StrShape,
    StructShape,
    TupleShape,
    UnitEnumShape,
    Via,
    ViaShape,
    shape_of,
)
from .codecs import (
    BOOL,
    MAX_NESTING,
    NOTHING,
    Codec,
    array_codec,
    blob_codec,
    enum_codec,
    float_codec,
    int_array_codec,
    int_codec,
    int_sequence_codec,
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
    "OnlyVariant",
    "Via",
    "codec",
    "decode",
    "encode",
    "pull",
    "push",
]

T = TypeVar("T")
E = TypeVar("E")


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


# -- the public verbs --------------------------------------------------------------------------------------------------


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
        ProtocolError: the bytes are anything else.
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
    made = _compile(shape_of(type), {})
    if len(_COMPILED) >= _MAX_COMPILED:
        _COMPILED.clear()
    _COMPILED[id(type)] = (type, made)
    return made


# -- from declarations to codecs ---------------------------------------------------------------------------------------


def _compile(shape: Shape, around: dict[StructShape, list[Codec]]) -> Codec:
    """The codec of one declaration.

    Args:
        shape: the declaration.
        around: the classes it stands in, each with room for its codec once that is made.
    """
    match shape:
        case NothingShape():
            return NOTHING
        case BoolShape():
            return BOOL
        case IntShape():
            return int_codec(shape)
        case FloatShape(bits):
            return float_codec(bits)
        case StrShape(limit):
            return str_codec(limit)
        case BytesShape(limit, fixed):
            return blob_codec(limit) if fixed is None else raw_codec(fixed)
        case SequenceShape(IntShape(bits) as item, make, limit, None) if bits > 8:
            return int_sequence_codec(item, make, limit)
        case SequenceShape(IntShape(bits) as item, make, _, int(fixed)) if bits > 8:
            return int_array_codec(item, make, fixed)
        case SequenceShape(item, make, limit, fixed):
            inner = _compile(item, around)
            return sequence_codec(inner, make, limit) if fixed is None else array_codec(inner, make, fixed)
        case TupleShape(parts):
            return tuple_codec([_compile(part, around) for part in parts])
        case MapShape(key, value, limit):
            return map_codec(_compile(key, around), _compile(value, around), limit)
        case OptionShape(some):
            return option_codec(_compile(some, around))
        case UnitEnumShape(cls):
            return unit_enum_codec(shape.members, cls.__name__)
        case EnumShape(variants):
            return enum_codec([(variant.cls, _compile(variant.shape, around)) for variant in variants], shape.name)
        case ViaShape(wire, to_wire, from_wire):
            return via_codec(_compile(wire, around), to_wire, from_wire)
        case StructShape(cls):
            if shape in around:
                room = around[shape]
                return recursive_codec(lambda: room[0], cls.__name__)
            around = {**around, shape: []}
            fields = [(field.name, _compile(part, around)) for field, part in shape.fields]
            made = struct_codec(cls, fields, cached=cls.__dict__.get("__postcard_cached__", False))
            around[shape].append(made)
            return made
