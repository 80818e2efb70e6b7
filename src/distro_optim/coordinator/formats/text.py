"""The text form of the run state: Psyche's ``state.toml``, and JSON.

serde's conventions (PsycheFoundation/psyche, ``config/*/state.toml``): a struct is a table, a unit variant a string,
a variant with data a table with the one key that names it, a newtype what it wraps, bytes a list of numbers. Keys that
we do not know are ignored. An option may be left out; TOML leaves ``None`` out on output, JSON writes ``null``.

Unlike Rust's ``toml`` crate, whose integers end at 2**63 - 1, ours reads and writes all of 64 bits: the random seeds
and filter keys of a running state need them.

Everything that is read may come from a stranger: any mistake in it raises a
:class:`~distro_optim.errors.ProtocolError` that names the field.
"""

from __future__ import annotations

import json
import math
import struct
import tomllib
from typing import Any, Final, TypeVar, cast

import tomli_w

from ...comm.declarations import (
    BoolShape,
    BytesShape,
    EnumShape,
    FloatShape,
    IntShape,
    MapShape,
    NothingShape,
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
from ...errors import LimitExceededError, ProtocolError

__all__ = ["from_json", "from_plain", "from_toml", "to_json", "to_plain", "to_toml"]

T = TypeVar("T")

_F32: Final = struct.Struct("<f")
_F32_DIGITS: Final = range(6, 10)  # nine decimal digits always tell two float32 apart, six are always exact


def to_plain(value: Any, declared: Any = None) -> Any:
    """A dict, list, string or number that says the same as ``value``.

    Args:
        value: an instance of ``declared``.
        declared: its declaration; by default the class of ``value``.
    """
    return _to_plain(shape_of(type(value) if declared is None else declared), value)


def from_plain(declared: type[T], plain: Any) -> T:
    """The value that dicts, lists, strings and numbers describe.

    Raises:
        ProtocolError: they do not.
    """
    return cast(T, _from_plain(shape_of(declared), plain))


def to_toml(value: Any, declared: Any = None) -> str:
    """Text of a table; see :func:`to_plain`."""
    return tomli_w.dumps(_without_none(to_plain(value, declared)))


def from_toml(declared: type[T], text: str) -> T:
    """See :func:`from_plain`.

    Raises:
        ProtocolError: it is not TOML, or it does not describe such a value.
    """
    try:
        plain = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"this is not TOML: {error}") from None
    return from_plain(declared, plain)


def to_json(value: Any, declared: Any = None, *, indent: int | None = None) -> str:
    """Text of an object; see :func:`to_plain`. A number that is not finite becomes null, as in serde."""
    return json.dumps(_finite(to_plain(value, declared)), indent=indent, allow_nan=False)


def from_json(declared: type[T], text: str | bytes) -> T:
    """See :func:`from_plain`.

    Raises:
        ProtocolError: it is not JSON, or it does not describe such a value.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"this is not JSON: {error}") from None
    return from_plain(declared, plain)


# -- writing -----------------------------------------------------------------------------------------------------------


def _to_plain(shape: Shape, value: Any) -> Any:
    match shape:
        case OptionShape(some):
            return None if value is None else _to_plain(some, value)
        case UnitEnumShape():
            return value.value
        case EnumShape(variants):
            variant = next(variant for variant in variants if variant.cls is type(value))
            if isinstance(variant.shape, StructShape) and not variant.shape.fields:
                return variant.name
            return {variant.name: _to_plain(variant.shape, value)}
        case StructShape(cls):
            if hasattr(cls, "__newtype__"):
                ((field, inner),) = shape.fields
                return _to_plain(inner, getattr(value, field.name))
            return {field.name: _to_plain(inner, getattr(value, field.name)) for field, inner in shape.fields}
        case SequenceShape(item):
            return [_to_plain(item, one) for one in value]
        case TupleShape(parts):
            return [_to_plain(part, one) for part, one in zip(parts, value, strict=True)]
        case MapShape(key, inner):
            return {_to_plain(key, name): _to_plain(inner, one) for name, one in value.items()}
        case BytesShape():
            return list(value)
        case ViaShape(wire, to_wire):
            return _to_plain(wire, to_wire(value))
        case FloatShape(32):
            return _shortest_f32(value)
        case _:
            return value


def _shortest_f32(value: float) -> float:
    """0.999 in place of 0.9990000128746033, if both are the same float32."""
    if not math.isfinite(value):
        return value
    for digits in _F32_DIGITS:
        short = float(f"{value:.{digits}g}")
        if _F32.pack(short) == _F32.pack(value):
            return short
    return value


def _without_none(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _without_none(value) for key, value in plain.items() if value is not None}
    if isinstance(plain, list):
        return [_without_none(value) for value in plain]
    return plain


def _finite(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


# -- reading -----------------------------------------------------------------------------------------------------------


def _from_plain(shape: Shape, plain: Any) -> Any:
    match shape:
        case OptionShape(some):
            return None if plain is None else _from_plain(some, plain)
        case IntShape():
            return _int_from(shape, plain)
        case FloatShape(bits):
            return _float_from(bits, plain)
        case BoolShape():
            return _expect(bool, "true or false", plain)
        case StrShape(limit):
            return _str_from(limit, plain)
        case BytesShape(limit, fixed):
            return bytes(_items_from(IntShape(8, False), plain, limit, fixed))
        case SequenceShape(item, make, limit, fixed):
            return make(_items_from(item, plain, limit, fixed))
        case TupleShape(parts):
            items = _expect(list, "a list", plain)
            if len(items) != len(parts):
                raise ProtocolError(f"{len(parts)} items are needed, not {len(items)}")
            return tuple(_inside(f"[{i}]", part, one) for i, (part, one) in enumerate(zip(parts, items, strict=True)))
        case MapShape(key, inner, limit):
            table = _expect(dict, "a table", plain)
            _check_count(len(table), limit, None)
            return {_from_plain(key, name): _inside(str(name), inner, one) for name, one in table.items()}
        case UnitEnumShape():
            return _member_from(shape, plain)
        case EnumShape():
            return _variant_from(shape, plain)
        case StructShape():
            return _struct_from(shape, plain)
        case ViaShape(wire, _, from_wire):
            return _checked(from_wire, _from_plain(wire, plain))
        case NothingShape():
            return None


def _expect(kind: type[T], words: str, plain: Any) -> T:
    if not isinstance(plain, kind):
        raise ProtocolError(f"{words} is expected, not {_shown(plain)}")
    return plain


def _shown(plain: Any) -> str:
    try:
        text = repr(plain)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:40] + "..."


def _int_from(shape: IntShape, plain: Any) -> int:
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise ProtocolError(f"a whole number is expected, not {_shown(plain)}")
    if not shape.low <= plain <= shape.high:
        raise LimitExceededError(f"{_shown(plain)} does not fit in {shape.name}")
    return plain


def _float_from(bits: int, plain: Any) -> float:
    if isinstance(plain, bool) or not isinstance(plain, (int, float)):
        raise ProtocolError(f"a number is expected, not {_shown(plain)}")
    try:
        return float(_F32.unpack(_F32.pack(plain))[0]) if bits == 32 else float(plain)
    except OverflowError:
        raise LimitExceededError(f"a number is too large for f{bits}") from None


def _str_from(limit: int | None, plain: Any) -> str:
    text = _expect(str, "a string", plain)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ProtocolError("a string is not UTF-8") from None
    if limit is not None and size > limit:
        raise LimitExceededError(f"a string of {size} bytes is above the limit of {limit}")
    return text


def _check_count(count: int, limit: int | None, fixed: int | None) -> None:
    if fixed is not None and count != fixed:
        raise ProtocolError(f"{fixed} items are needed, not {count}")
    if limit is not None and count > limit:
        raise LimitExceededError(f"{count} items are above the limit of {limit}")


def _items_from(item: Shape, plain: Any, limit: int | None, fixed: int | None) -> list[Any]:
    items = _expect(list, "a list", plain)
    _check_count(len(items), limit, fixed)
    return [_inside(f"[{index}]", item, one) for index, one in enumerate(items)]


def _member_from(shape: UnitEnumShape, plain: Any) -> Any:
    for member in shape.cls:
        if member.value == plain:
            return member
    names = ", ".join(str(member.value) for member in shape.cls)
    raise ProtocolError(f"one of {names} is expected, not {_shown(plain)}")


def _variant_from(shape: EnumShape, plain: Any) -> Any:
    if isinstance(plain, str):
        name, payload = plain, None
    elif isinstance(plain, dict) and len(plain) == 1:
        ((name, payload),) = plain.items()
    else:
        raise ProtocolError(f"the name of a variant, or a table with its name, is expected, not {_shown(plain)}")
    for variant in shape.variants:
        if variant.name == name:
            if isinstance(variant.shape, StructShape) and not variant.shape.fields:
                return variant.cls()
            return _inside(name, variant.shape, payload)
    names = ", ".join(variant.name for variant in shape.variants)
    raise ProtocolError(f"one of {names} is expected, not {_shown(name)}")


def _struct_from(shape: StructShape, plain: Any) -> Any:
    if hasattr(shape.cls, "__newtype__"):
        ((_, inner),) = shape.fields
        return shape.cls(_from_plain(inner, plain))
    table = _expect(dict, "a table", plain)
    values: dict[str, Any] = {}
    for field, inner in shape.fields:
        if field.name in table:
            values[field.name] = _inside(field.name, inner, table[field.name])
        elif isinstance(inner, OptionShape):
            values[field.name] = None
        elif not field.metadata.get("optional_in_text"):
            raise ProtocolError("the key is missing", field=field.name)
    return _checked(lambda given: shape.cls(**given), values)


def _checked(make: Any, value: Any) -> Any:
    try:
        return make(value)
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _inside(name: str, shape: Shape, plain: Any) -> Any:
    """Reads a part; an error inside it gets its name in front."""
    try:
        return _from_plain(shape, plain)
    except ProtocolError as error:
        error.field = step_into(name, error.field)
        raise
