"""Methods that ``torch.compile`` leaves as they are.

To exclude a method from compilation loads the compiler, which takes seconds and a hundred megabytes, and which whoever
does not compile never needs. So it is excluded once the compiler is there: before, nobody can be compiling.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import torch

__all__ = ["excluded_by_torch", "uncompiled"]

P = ParamSpec("P")
T = TypeVar("T")

COMPILER: Final = "torch._dynamo"


def uncompiled(method: Callable[P, T]) -> Callable[P, T]:
    """``method``, which runs as it is also where a compiled function calls it, or where it is compiled itself.

    Steps write to memory that other objects know by its address, and compilers do not see all of that: they would
    compute other weights. There is nothing to gain either, as most of the time goes into a few large operations.
    """
    excluded: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def as_it_is(*args: P.args, **kwargs: P.kwargs) -> T:
        if COMPILER not in sys.modules:
            return method(*args, **kwargs)
        if not excluded:
            excluded.append(torch.compiler.disable(method))
        result: T = excluded[0](*args, **kwargs)
        return result

    return as_it_is


def excluded_by_torch(method: Callable[P, T]) -> Callable[P, T]:
    """``method`` of torch's ``Optimizer``, which loads the compiler with its first call to be excluded: not before
    somebody else has."""
    plain: Callable[P, T] = getattr(method, "__wrapped__", method)

    @functools.wraps(plain)
    def as_it_is(*args: P.args, **kwargs: P.kwargs) -> T:
        return (method if COMPILER in sys.modules else plain)(*args, **kwargs)

    return as_it_is
