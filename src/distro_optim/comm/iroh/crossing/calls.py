"""Calls of Rust functions that answer at once: half of what one costs in Python is the two empty objects made for an
error that does not come. A round with sixteen peers makes some two thousand such calls in each of them."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

__all__ = ["LightCalls", "light_calls"]

_STATUS_FIELDS: Final = ("code", "error_buf")
_CALL_PARAMETERS: Final = ("error_ffi_converter", "fn", "args")
_CHECK_PARAMETERS: Final = ("error_ffi_converter", "call_status")


@dataclass(frozen=True)
class LightCalls:
    """Replacements for ``_uniffi_rust_call`` and ``_uniffi_rust_call_with_error``."""

    call: Callable[..., Any]
    call_with_error: Callable[..., Any]


def light_calls(module: ModuleType) -> LightCalls:
    """The replacements for ``module``; raises if it does not do calls as this file knows them."""
    status_type: Any = module._UniffiRustCallStatus
    fields = tuple(name for name, _ in status_type._fields_)
    if fields != _STATUS_FIELDS:
        raise TypeError(f"unknown status of calls {fields}")
    if status_type.CALL_SUCCESS != 0 or bytes(status_type()) != bytes(status_type.default()):
        raise ValueError("a status that is all zeros is not that of a call to come")
    check: Callable[[Any, Any], None] = module._uniffi_check_call_status
    for function, expected in ((module._uniffi_rust_call_with_error, _CALL_PARAMETERS), (check, _CHECK_PARAMETERS)):
        parameters = tuple(inspect.signature(function).parameters)
        if parameters != expected:
            raise TypeError(f"unknown parameters {parameters}")
    byref = ctypes.byref

    def call_with_error(error_ffi_converter: Any, fn: Any, *args: Any) -> Any:
        status = status_type()
        result = fn(*args, byref(status))
        if status.code:
            check(error_ffi_converter, status)
        return result

    def call(fn: Any, *args: Any) -> Any:
        status = status_type()
        result = fn(*args, byref(status))
        if status.code:
            check(None, status)
        return result

    return LightCalls(call, call_with_error)
