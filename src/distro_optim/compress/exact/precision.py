"""Products of float32 that are products of float32, whatever a script allows for its model.

The precision of products belongs to the process: a script that allows TensorFloat-32 or bfloat16 for its model's
(``torch.set_float32_matmul_precision``) does not mean those of a step, where it would change weights. Some CPUs have
such products, too (Intel's AMX).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

__all__ = ["true_float32"]

_BACKENDS: Final = ("cuda", "mkldnn")
"""Whose products in float32 can be told to be others."""


class _Precision:
    """How many are in need of true float32, and what was set before the first of them."""

    def __init__(self) -> None:
        self.changing = threading.Lock()
        self.users = 0
        self.before: dict[str, str] = {}

    def pin(self) -> None:
        with self.changing:
            self.users += 1
            if self.users == 1:
                self.before = {name: value for name, value in _precisions().items() if value not in _TRUE}
                _set_precisions(dict.fromkeys(self.before, "highest" if _OLD in self.before else "ieee"))

    def release(self) -> None:
        with self.changing:
            self.users -= 1
            if self.users == 0:
                _set_precisions(self.before)
                self.before = {}


_OLD: Final = "all"
"""Before torch 2.9 there is one setting for all backends."""

_TRUE: Final = ("none", "ieee", "highest")


def _precisions() -> dict[str, str]:
    get: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
    if get is None:
        return {_OLD: torch.get_float32_matmul_precision()}
    return {name: get(name, "matmul") for name in _BACKENDS}


def _set_precisions(values: dict[str, str]) -> None:
    for name, value in values.items():
        if name == _OLD:
            torch.set_float32_matmul_precision(value)
        else:
            _set_precision(name, "none")
            if _precisions()[name] != value:  # otherwise it comes from a setting above, and goes with it
                _set_precision(name, value)


def _set_precision(backend: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, "matmul", value)


_precision = _Precision()


@contextmanager
def true_float32() -> Iterator[None]:
    """Within this block products of float32 are IEEE 754's in all threads, whatever the script allows for its model."""
    pinned = _precision
    pinned.pin()
    try:
        yield
    finally:
        pinned.release()


def _after_fork() -> None:
    global _precision
    _precision = _Precision()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
