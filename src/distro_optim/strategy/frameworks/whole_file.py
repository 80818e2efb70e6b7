"""Lightning's checkpoints appear under their name when they are whole.

Lightning itself moves a finished file to where it should be, which copies it if that is on another disk: when that
disk is full, a cut-off file remains under the checkpoint's name, in the place of one that was whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

__all__ = ["whole_file"]

_PART: Final = ".part"


@contextmanager
def whole_file(path: str | os.PathLike[str], checkpoint_io: object) -> Iterator[Any]:
    """Yields where to write; the file is moved to ``path`` if nothing was raised, and removed otherwise.

    Args:
        path: may be a URL, to which is written directly, as with plugins that write in a way of their own.
        checkpoint_io: Lightning's plugin that writes.

    Raises:
        OSError: it could not be moved.
    """
    if "://" in os.fspath(path) or type(checkpoint_io).__name__ != "TorchCheckpointIO":
        yield path
        return
    target = Path(path)
    part = target.with_name(target.name + _PART)
    try:
        yield part
        if part.exists():  # only the first of several processes writes
            os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
