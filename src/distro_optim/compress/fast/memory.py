"""Single numbers at an address, which is an int64 that came from ``tensor.data_ptr()``; offsets are in elements."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .vectors import FLOAT, INT32, intrinsic, signature

__all__ = ["peek", "peek_byte", "peek_int", "poke", "poke_int"]


def _read(element: Any, result: Any) -> tuple[Any, Any]:
    def generate(context: Any, b: Any, sig: Any, arguments: Any) -> Any:
        return b.load(b.gep(b.inttoptr(arguments[0], element.as_pointer()), [arguments[1]]))

    return signature(result, types.int64, types.int64), generate


def _write(element: Any, taken: Any) -> tuple[Any, Any]:
    def generate(context: Any, b: Any, sig: Any, arguments: Any) -> Any:
        b.store(arguments[2], b.gep(b.inttoptr(arguments[0], element.as_pointer()), [arguments[1]]))
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64, taken), generate


@intrinsic
def peek(typing, address, offset):  # type: ignore[no-untyped-def]
    """The float32 there."""
    return _read(FLOAT, types.float32)


@intrinsic
def peek_int(typing, address, offset):  # type: ignore[no-untyped-def]
    """The int32 there; of a float32, its bits."""
    return _read(INT32, types.int32)


@intrinsic
def peek_byte(typing, address, offset):  # type: ignore[no-untyped-def]
    """The byte there."""
    return _read(ir.IntType(8), types.uint8)


@intrinsic
def poke(typing, address, offset, value):  # type: ignore[no-untyped-def]
    """Puts a float32 there."""
    return _write(FLOAT, types.float32)


@intrinsic
def poke_int(typing, address, offset, value):  # type: ignore[no-untyped-def]
    """Puts an int32 there."""
    return _write(INT32, types.int32)
