"""Methods that ``torch.compile`` leaves as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["uncompiled"]

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(method: Callable[P, T]) -> Callable[P, T]:
    """``method``, which runs as it is also where a compiled function calls it, or where it is compiled itself.

    Steps write to memory that other objects know by its address, and compilers do not see all of that: they would
    compute other weights. There is nothing to gain either, as most of the time goes into a few large operations.
    """
    excluded: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def as_it_is(*args: P.args, **kwargs: P.kwargs) -> T:
        # Not before the first call: it loads the compiler, which any optimizer does when it is made, but no import.
        if not excluded:
            excluded.append(torch.compiler.disable(method))
        result: T = excluded[0](*args, **kwargs)
        return result

    return as_it_is
