"""Whether the compiled kernels are there: loaded with the first step that wants them, never at import.

They come with numba, the extra ``distro-optim[fast]``. Without it, where they cannot be compiled, and where
``DISTRO_OPTIM_FAST=0`` says so, torch does the same.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import numpy as np

from ...console import narrated
from ..plan import PLACE_COLUMNS

__all__ = ["SETTING", "kernel", "setting"]

SETTING: Final = "DISTRO_OPTIM_FAST"
"""Environment variable: ``0`` leaves all work to torch, ``1`` takes the kernels for the smallest models too."""

_log = logging.getLogger(__name__)

_known: dict[str, Any] = {}
"""Kernels by name, None where there is none."""


def setting() -> str:
    """What the environment says now, or ``""``."""
    return os.environ.get(SETTING, "").strip()


def kernel(name: str) -> Any:
    """The compiled ``merge``, ``shift`` or ``extract_from_weights``, say; None where torch has to do it.

    Compiles it, or loads what was compiled before, when it is first asked for: so a call of it cannot fail half-way.
    Warns once where that fails.
    """
    if name not in _known:
        _known[name] = _loaded(name) if importlib.util.find_spec("numba") is not None else None
    return _known[name]


def _loaded(name: str) -> Any:
    try:
        from . import finiteness, momentum, shifting, weights

        for module in (finiteness, momentum, shifting, weights):
            if hasattr(module, name) and name in module.__all__:
                with narrated(f"compiling a part of the step ({name}), once on this machine", _log.warning):
                    return _tried(module, name)
        raise LookupError(name)
    except Exception as error:
        # numba and LLVM fail in many ways, on machines that they do not know or whose disk is full.
        warnings.warn(
            f"distro_optim: the compiled kernels of distro-optim[fast] cannot be used, and torch does their work, "
            f"more slowly: {type(error).__name__}: {error}. {SETTING}=0 leaves them alone",
            UserWarning,
            stacklevel=2,
        )
        return None


def _tried(module: ModuleType, name: str) -> Callable[..., Any]:
    """The kernel, after a call of it with no tiles, which compiles it for the types that it will be called with."""
    function: Callable[..., Any] = getattr(module, name)
    addresses, places = np.zeros(0, np.int64), np.zeros((0, PLACE_COLUMNS), np.int64)
    tiles = places, 0, 0, 2, 2
    zero, basis, floats = np.float32(0), np.zeros((0, 0)), np.zeros((0, 0), np.float32)
    out = np.zeros((0, 1), np.int32), floats, np.zeros((0, 1), np.bool_), np.zeros(0, np.bool_)
    if name == "merge":
        everybody = addresses, addresses, True, np.zeros((0, 0), np.bool_), np.zeros(1), 0, 0
        function(*tiles, addresses, zero, 1, *everybody, basis, basis, addresses, addresses, zero)
    elif name == "squares":
        function(0, 0)
    elif name == "shift":
        function(0, 0, 0, 0, zero)
    elif name == "extract_from_weights":
        function(*tiles, *[addresses] * 4, zero, zero, 1, *[floats] * 4, *out)
    else:
        function(*tiles, *[addresses] * 2, zero, zero, 1, *[floats] * 2, *out)
    return function
