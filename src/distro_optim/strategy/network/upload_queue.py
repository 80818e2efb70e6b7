"""What is to be uploaded next, what became of the others, and what is said of it. No I/O, no clock.

Whatever happens to uploads, training goes on: what fails for good is told once and counted, and if checkpoints come
faster than they can be carried away, the oldest that waits is left out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...comm.backoff import BackoffPolicy
from ..upload import Saved

__all__ = ["UploadCounts", "UploadQueue"]

MAX_WAITING: Final = 2
"""Beside the one that is under way: each keeps a checkpoint on the disk that rotation would have removed."""

BETWEEN_TRIES: Final = BackoffPolicy(first=5.0, factor=3.0, longest=300.0, jitter=0.2)
"""Seconds; with five tries about five minutes in all. Chosen arbitrarily."""


@dataclass(frozen=True)
class UploadCounts:
    """Of one peer, since it began.

    Attributes:
        done: arrived.
        failed: given up after the last try.
        left_out: not tried to the end, since later ones came, or the run ended.
        waiting: still to be done.
    """

    done: int = 0
    failed: int = 0
    left_out: int = 0
    waiting: int = 0


@dataclass
class _Job:
    saved: Saved
    failures: int = 0
    due: float = 0.0


class UploadQueue:
    """See the module.

    Args:
        tries: attempts for each.
    """

    def __init__(self, tries: int) -> None:
        self._tries = tries
        self._jobs: deque[_Job] = deque()
        self._under_way: _Job | None = None
        self._news: list[str] = []
        self._done = self._failed = self._left_out = 0
        self._broken = False  # as the last one that ended showed

    def submit(self, saved: Saved) -> None:
        """Something is to be uploaded."""
        self._jobs.append(_Job(saved))
        waiting = [job for job in self._jobs if job is not self._under_way]
        for job in waiting[:-MAX_WAITING]:
            self._jobs.remove(job)
            self._left_out += 1
            if self._left_out == 1:
                self._news.append(
                    f"uploads are slower than checkpoints: {job.saved.path.name} is left out, and so will others be "
                    "that wait while newer ones come; they are counted from now on"
                )

    def next(self, now: float) -> tuple[Saved | None, float | None]:
        """The one to try now; otherwise the seconds until one is due, None if nothing waits."""
        if self._under_way is not None or not self._jobs:
            return None, None
        job = self._jobs[0]
        if job.due > now:
            return None, job.due - now
        self._under_way = job
        return job.saved, 0.0

    def succeeded(self) -> None:
        """The one under way has arrived."""
        job = self._take()
        self._done += 1
        if self._done == 1 or self._broken:
            again = f"; {self._failed} did not arrive before" if self._broken else ""
            self._news.append(f"{job.saved.path.name} is uploaded{again}")
        self._broken = False

    def failed(self, reason: str, now: float, draw: float) -> None:
        """The one under way did not arrive.

        Args:
            reason: printable.
            now: seconds.
            draw: uniform in [0, 1).
        """
        job = self._take(keep=True)
        job.failures += 1
        if job.failures < self._tries:
            job.due = now + BETWEEN_TRIES.delay(job.failures, draw)
            return
        self._jobs.remove(job)
        self._failed += 1
        if not self._broken:
            self._news.append(
                f"{job.saved.path.name} could not be uploaded in {self._tries} tries: {reason}. It stays in "
                f"{job.saved.path.parent} as long as others do, training goes on, and the next one is tried; failures "
                "are counted from now on"
            )
        self._broken = True

    def abandon(self) -> list[Path]:
        """Nothing more will be tried. Returns what has not arrived, as far as it waited."""
        paths = [job.saved.path for job in self._jobs]
        self._left_out += len(paths)
        self._jobs.clear()
        self._under_way = None
        return paths

    def holds(self, path: Path) -> bool:
        """Whether something waits to be uploaded, or is being."""
        return any(job.saved.path == path for job in self._jobs)

    @property
    def counts(self) -> UploadCounts:
        """What became of all of them."""
        return UploadCounts(self._done, self._failed, self._left_out, len(self._jobs))

    @property
    def names(self) -> list[str]:
        """What waits or is under way."""
        return [job.saved.path.name for job in self._jobs]

    def take_news(self) -> list[str]:
        """Sentences for people, once."""
        news, self._news = self._news, []
        return news

    def _take(self, *, keep: bool = False) -> _Job:
        job = self._under_way
        if job is None:
            raise RuntimeError("nothing is being uploaded")
        self._under_way = None
        if not keep:
            self._jobs.remove(job)
        return job
