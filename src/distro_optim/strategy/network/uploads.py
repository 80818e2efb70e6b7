"""Uploads of what a peer saves, in a thread of their own: training never waits for them, and never ends for them."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..upload import Saved, Upload
from .upload_carriers import Carrier, UploadFailed, carrier_of
from .upload_queue import UploadCounts, UploadQueue

__all__ = ["Uploads"]

SAY_SECONDS: Final = 10.0
"""Between two sentences while the end of the run waits for uploads."""

_log = logging.getLogger(__name__)


class Uploads:
    """See the module. All methods are for any thread.

    Args:
        upload: where to, and how long.
        carrier: copies; None makes the one that ``upload`` asks for.

    Raises:
        ConfigurationError: there is no such command or store.
        MissingDependencyError: a package is missing; says which.
    """

    def __init__(self, upload: Upload, carrier: Carrier | None = None) -> None:
        self._upload = upload
        self._carrier = carrier if carrier is not None else carrier_of(upload)
        self._queue = UploadQueue(upload.tries)
        self._changed = threading.Condition()
        self._stopped = self._given_up = False
        self._thread: threading.Thread | None = None

    def submit(self, path: Path, *, step: int, run_id: str) -> None:
        """Something was saved, as a whole. Returns at once.

        Args:
            path: a folder or a file.
            step: the run's step that comes next.
            run_id: the run.
        """
        with self._changed:
            if self._stopped:
                return
            self._queue.submit(Saved(path=path.absolute(), step=step, run_id=run_id))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="distro-optim-uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def holds(self, path: Path) -> bool:
        """Whether it waits to be uploaded, or is being: then it should stay on the disk."""
        with self._changed:
            return self._queue.holds(path.absolute())

    @property
    def counts(self) -> UploadCounts:
        """What became of them."""
        with self._changed:
            return self._queue.counts

    def take_news(self) -> list[str]:
        """Sentences for people, once."""
        with self._changed:
            return self._queue.take_news()

    def give_up(self) -> None:
        """Lets :meth:`close` wait no longer."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def close(self, tell: Callable[[str], None]) -> None:
        """Waits for what is not done, as long as ``wait_seconds`` says, and ends. Ctrl-C ends the waiting at once.

        Args:
            tell: told what is waited for, and what did not arrive.
        """
        try:
            self._wait(tell)
        except KeyboardInterrupt:
            pass  # which the text has promised
        with self._changed:
            self._stopped = True
            lost = self._queue.abandon()
            self._changed.notify_all()
        if lost:
            self._carrier.cancel()
            tell(f"not uploaded: {', '.join(map(str, lost))}; copy it yourself if you need it elsewhere")
        for text in self.take_news():
            tell(text)
        counts = self.counts
        if counts.failed or counts.left_out:
            tell(f"uploads: {counts.done} arrived, {counts.failed} failed, {counts.left_out} were left out")

    def _wait(self, tell: Callable[[str], None]) -> None:
        now = time.monotonic()
        ends, says = now + self._upload.wait_seconds, now
        while True:
            with self._changed:
                names = self._queue.names
                now = time.monotonic()
                if not names or now >= ends or self._given_up:
                    return
                if now < says:
                    self._changed.wait(min(ends, says) - now)
                    continue
            says = now + SAY_SECONDS
            tell(f"waiting for the upload of {', '.join(names)}, {ends - now:.0f} s at most; Ctrl-C does not wait")

    def _work(self) -> None:
        while (saved := self._next()) is not None:
            try:
                if not saved.path.exists():
                    raise UploadFailed("it is not there any more")
                self._carrier.carry(saved)
            except UploadFailed as error:
                self._ended(str(error))
            except Exception as error:
                _log.exception("an upload failed in an unforeseen way")
                self._ended(type(error).__name__)
            else:
                self._ended(None)

    def _next(self) -> Saved | None:
        """The next one, when it is due; None at the end."""
        with self._changed:
            while not self._stopped:
                saved, seconds = self._queue.next(time.monotonic())
                if saved is not None:
                    return saved
                self._changed.wait(seconds)
        return None

    def _ended(self, reason: str | None) -> None:
        with self._changed:
            if self._stopped:
                return
            if reason is None:
                self._queue.succeeded()
            else:
                _log.info("an upload failed: %s", reason)
                self._queue.failed(reason, time.monotonic(), random.random())
            self._changed.notify_all()
