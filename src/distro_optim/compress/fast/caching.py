"""Compiled once per machine: numba's cache in a folder of our own, or none where nothing can be written.

numba looks only at the file of a function to see whether what it has compiled is out of date. Here the text of a
routine is made in other files, so the folder is named after the contents of all of them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numba

__all__ = ["compiled", "folder"]

_NAME: Final = "distro_optim"

_config: Any = numba.config  # its settings are no names that a type checker could see


def _chosen() -> Path | None:
    """A folder that can be written to, or None."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(here.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    given = _config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME")
    for parent in [Path(given)] if given else [Path.home() / ".cache"]:
        path = parent / _NAME / digest.hexdigest()[:16]
        try:
            # What is found there is unpickled: it must be nobody else's.
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
        except OSError:
            return None
    return None


def _found() -> Path | None:
    try:
        return _chosen()
    except (OSError, RuntimeError):  # sources that cannot be read; no home
        return None


folder: Final = _found()
"""``NUMBA_CACHE_DIR``, ``XDG_CACHE_HOME`` or ``~/.cache``, and in it a folder for these sources; None: no cache."""


def compiled(function: Callable[..., Any]) -> Any:
    """numba's compiled form of a function of a module, which releases the interpreter lock."""
    if folder is None:
        return numba.njit(nogil=True)(function)
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(folder)
    try:
        return numba.njit(nogil=True, cache=True)(function)
    finally:
        _config.CACHE_DIR = before
