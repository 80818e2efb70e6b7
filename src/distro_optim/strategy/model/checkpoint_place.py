"""Where a process keeps its checkpoints, if others on this machine were given the same folder.

Everybody runs the same script, so two terminals in one folder name one ``checkpoint_dir``. Two processes that saved
there would remove each other's unfinished files, and each would resume with the momentum of the other. So the first has
the folder, and those after it a folder in it each, ``peer-2`` and so on: in the same order they find their own again.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Final, Self

from ...comm.iroh.lock_file import lock_file

__all__ = ["CheckpointPlace"]

LOCK: Final = ".checkpoints.lock"
"""In the folder; held by the process that saves there."""

MAX_PLACES: Final = 64
"""Processes on a machine. Beyond it, or where nothing can be locked, the folder is used as it is given."""


class CheckpointPlace:
    """A folder that this process has for itself, until :meth:`release` or its end.

    Attributes:
        directory: that.
    """

    def __init__(self, directory: Path, lock: IO[bytes] | None) -> None:
        self.directory = directory
        self._lock = lock

    @classmethod
    def take(cls, folder: Path) -> Self:
        """The folder, or the first in it that no other process has. What cannot be written is found by who writes."""
        for number in range(1, MAX_PLACES + 1):
            place = folder if number == 1 else folder / f"peer-{number}"
            try:
                place.mkdir(parents=True, exist_ok=True)
                lock = lock_file(place / LOCK)
            except OSError:
                break
            if lock is not None:
                return cls(place, lock)
        return cls(folder, None)

    def release(self) -> None:
        """Another process may have it. May be called again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
