"""What is computed in another thread while this one trains: the hashes of the weights of a step, and other jobs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ..rounds.weights import TensorDigest
from .still_weights import StillWeights, WeightsGone

__all__ = ["SideJobs", "WeightsHasher"]

_THREAD_NAME: Final = "distro-optim-hash"

_log: Final = logging.getLogger(__name__)


class WeightsHasher:
    """Hashes weights where they lie still. Its methods belong to the thread that trains.

    There is a thread only while there is something to hash, so none is left when a script ends in mid-training: it goes
    as soon as it has hashed what it was given.

    Args:
        weights: where they lie.
        done: called with the step and the digests, 32 bytes for each tensor; in the other thread.
    """

    def __init__(self, weights: StillWeights, done: Callable[[int, Sequence[bytes]], None]) -> None:
        self._weights = weights
        self._done = done
        self._thread: threading.Thread | None = None
        self._stopped = False
        # Of the last step that was hashed; the step is -1 before the first.
        self._latest: tuple[int, tuple[bytes, ...]] = (-1, ())
        self._error: BaseException | None = None

    def start(self, step: int, tensors: Sequence[TensorDigest]) -> None:
        """Hashes the weights of ``step``, which lie still until :meth:`wait` has returned. The order is that of
        ``tensors``, fresh digests for each. Waits for those of the step before."""
        self.wait()
        name = f"{_THREAD_NAME}-{step}"
        thread = threading.Thread(target=self._hash, args=(step, tuple(tensors)), name=name, daemon=True)
        # Known only once it runs: another thread may close all this meanwhile, and waits for what is known. Ctrl-C in
        # between leaves a thread that ends by itself, when it is stopped or the weights are taken up.
        thread.start()
        self._thread = thread

    def wait(self) -> tuple[bytes, ...]:
        """The digests of the last step, as soon as they are there; those before it, if hashing was stopped."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                thread.join()
            except BaseException:  # Ctrl-C: the thread is still at work
                self._thread = thread
                raise
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._latest[1]

    def take(self, step: int, digests: Sequence[bytes]) -> None:
        """The weights of ``step`` were hashed already, in this thread. Waits for those of the step before."""
        self.wait()
        self._latest = (step, tuple(digests))
        self._done(step, digests)

    @property
    def latest(self) -> tuple[int, tuple[bytes, ...]]:
        """The last step that was hashed, -1 before the first, and its digests. For any thread."""
        return self._latest

    def replace(self, step: int, digests: Sequence[bytes]) -> None:
        """The weights of ``step`` have these digests now: some of them were replaced."""
        self._latest = (step, tuple(digests))

    def stop(self) -> None:
        """Ends what is under way after the piece that is being read. Nothing is hashed any more."""
        self._stopped = True
        self.wait()

    def _hash(self, step: int, tensors: Sequence[TensorDigest]) -> None:
        try:
            for tensor in tensors:
                self._weights.read(step, tensor.name, lambda piece, into=tensor: self._take(into, piece))  # type: ignore[misc]
        except (WeightsGone, _Stopped):
            return
        except BaseException as error:
            self._error = error  # to be raised in the thread that trains: it would wait for hashes for ever
            return
        digests = tuple(tensor.digest() for tensor in tensors)
        self._latest = (step, digests)
        self._done(step, digests)

    def _take(self, tensor: TensorDigest, piece: memoryview) -> None:
        if self._stopped:
            raise _Stopped
        tensor.update(piece)


class SideJobs:
    """Jobs beside the training, one after the other. Its methods belong to the thread that trains.

    There is a thread only while there is something to do.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[tuple[int, Callable[[], object]]] = deque()
        self._given = self._done = 0
        self._thread: threading.Thread | None = None

    def add(self, job: Callable[[], object]) -> int:
        """Another job, which must not raise; its number is for :meth:`wait`."""
        with self._changed:
            self._given += 1
            self._jobs.append((self._given, job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            return self._given

    def wait(self, number: int) -> None:
        """Returns when the job of this number is done."""
        with self._changed:
            while self._done < number:
                self._changed.wait()

    def wait_for_all(self) -> None:
        """Returns when all jobs are done."""
        self.wait(self._given)

    def stop(self) -> None:
        """Leaves out what has not begun, and waits for what has."""
        with self._changed:
            self._jobs.clear()
            while self._thread is not None:
                self._changed.wait()
            self._done = self._given

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                number, job = self._jobs.popleft()
            try:
                job()
            except Exception as error:
                _log.warning("what was to be done beside the training failed", exc_info=error)
            finally:
                with self._changed:
                    self._done = number
                    self._changed.notify_all()


class _Stopped(Exception):
    """Nobody wants the hashes any more."""
