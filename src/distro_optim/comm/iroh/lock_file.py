"""A file that one process holds at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

__all__ = ["lock_file"]


def lock_file(path: Path) -> IO[bytes] | None:
    """Takes an exclusive lock that ends with the process, however that ends; None if another process has it."""
    file = open(path, "ab")  # noqa: SIM115 - it stays open as long as the lock is held
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
