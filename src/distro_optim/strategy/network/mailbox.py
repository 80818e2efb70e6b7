"""What lies between the thread of the network and the thread that trains: one queue, and the list of what is cancelled.

Also keeps the time, for both sides tell here when they begin and end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from ..port import RunEvent, TrainerAction
from ..rounds.actions import TrainBatch

__all__ = ["Mailbox"]

_SLICE_SECONDS: Final = 0.2
"""A wait is made of pieces of this length: on some systems Ctrl-C does not end a wait on a lock."""

_MAX_EVENTS: Final = 256
_MAX_CANCELLED: Final = 1024
"""Far more rounds than a trainer can lag behind. Chosen arbitrarily."""


class Mailbox:
    """Filled by the network's thread, emptied by the training thread.

    Args:
        clock: monotonic seconds.

    Attributes:
        seconds_waiting: that the training thread has spent in :meth:`take`.
        seconds_training: between taking a :class:`~.actions.TrainBatch` and :meth:`answered`.
        rounds_trained, rounds_cancelled: answers.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._actions: deque[TrainerAction] = deque()
        self._events: deque[RunEvent] = deque(maxlen=_MAX_EVENTS)
        self._cancelled: deque[int] = deque(maxlen=_MAX_CANCELLED)
        self._error: BaseException | None = None
        self._training_since: float | None = None
        self._waiting_since: float | None = None
        self._seconds_waiting = 0.0
        self.seconds_training = 0.0
        self.rounds_trained = 0
        self.rounds_cancelled = 0

    @property
    def seconds_waiting(self) -> float:
        since = self._waiting_since
        return self._seconds_waiting + (self._clock() - since if since is not None else 0.0)

    # -- from the network's thread -------------------------------------------------------------------------------------

    def put(self, action: TrainerAction) -> None:
        """One thing more to do."""
        with self._changed:
            self._actions.append(action)
            self._changed.notify_all()

    def cancel(self, step: int) -> None:
        """The training of ``step`` is to be stopped."""
        with self._changed:
            self._cancelled.append(step)

    def tell(self, event: RunEvent) -> None:
        """Something happened."""
        with self._changed:
            self._events.append(event)

    def end(self, error: BaseException) -> None:
        """Nothing more will come: :meth:`take` raises ``error`` once what is there has been taken."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """As :meth:`end`, and what is there is not to be done any more."""
        with self._changed:
            self._actions.clear()
        self.end(error)

    # -- from the training thread --------------------------------------------------------------------------------------

    def take(self, timeout: float | None = None) -> TrainerAction | None:
        """The next action; None if none comes in ``timeout`` seconds. Raises what :meth:`end` was given."""
        began = self._clock()
        end = None if timeout is None else began + timeout
        self._waiting_since = began
        try:
            with self._changed:
                while not self._actions and self._error is None:
                    left = _SLICE_SECONDS if end is None else min(_SLICE_SECONDS, end - self._clock())
                    if left <= 0:
                        return None
                    self._changed.wait(left)
                if not self._actions:
                    assert self._error is not None
                    raise self._error
                action = self._actions.popleft()
        finally:
            self._waiting_since = None
            self._seconds_waiting += self._clock() - began
        if isinstance(action, TrainBatch):
            self._training_since = self._clock()
        return action

    def is_cancelled(self, step: int) -> bool:
        return step in self._cancelled or self._error is not None

    def answered(self, *, trained: bool) -> None:
        """The training is over."""
        if self._training_since is not None:
            self.seconds_training += self._clock() - self._training_since
            self._training_since = None
        if trained:
            self.rounds_trained += 1
        else:
            self.rounds_cancelled += 1

    def take_events(self) -> list[RunEvent]:
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events
