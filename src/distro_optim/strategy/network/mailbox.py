"""What lies between the thread of the network and the thread that trains: a queue, and the list of what is cancelled.

It also keeps the time, since both sides report here when they begin and end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from ..polling import POLL_SECONDS
from ..port import RunEvent, TrainerAction
from ..rounds.actions import TrainBatch

__all__ = ["Mailbox"]

_MAX_EVENTS: Final = 256
"""Of more that nobody takes, the oldest are forgotten. Chosen arbitrarily."""

_MAX_CANCELLED: Final = 1024
"""Far more rounds than a trainer can lag behind. Chosen arbitrarily."""


class Mailbox:
    """Filled by the network's thread, emptied by the training thread.

    Args:
        clock: monotonic seconds.

    Attributes:
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
        """Seconds that the training thread has spent in :meth:`take`, a wait that goes on included."""
        since = self._waiting_since
        return self._seconds_waiting + (self._clock() - since if since is not None else 0.0)

    # -- from the network's thread -------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Actions that nobody has taken yet."""
        return len(self._actions)

    def put(self, action: TrainerAction) -> None:
        """One more thing to do."""
        with self._changed:
            self._actions.append(action)
            self._changed.notify_all()

    def cancel(self, step: int) -> None:
        """The training of ``step`` is to be stopped."""
        with self._changed:
            self._cancelled.append(step)

    def put_event(self, event: RunEvent) -> None:
        """Something happened; see :meth:`take_events`."""
        with self._changed:
            self._events.append(event)

    def end(self, error: BaseException) -> None:
        """Nothing more will come: :meth:`take` raises ``error`` once what is there has been taken."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """As :meth:`end`, but what is there is dropped."""
        with self._changed:
            self._actions.clear()
        self.end(error)

    # -- from the training thread --------------------------------------------------------------------------------------

    def take(self, timeout: float | None = None) -> TrainerAction | None:
        """The next action; None if none comes within ``timeout`` seconds. Raises what :meth:`end` was given."""
        began = self._clock()
        end = None if timeout is None else began + timeout
        self._waiting_since = began
        try:
            with self._changed:
                while not self._actions:
                    if self._error is not None:
                        raise self._error
                    left = POLL_SECONDS if end is None else min(POLL_SECONDS, end - self._clock())
                    if left <= 0:
                        return None
                    self._changed.wait(left)
                action = self._actions.popleft()
        finally:
            self._waiting_since = None
            self._seconds_waiting += self._clock() - began
        if isinstance(action, TrainBatch):
            self._training_since = self._clock()
        return action

    def is_cancelled(self, step: int) -> bool:
        """Whether the training of ``step`` is to be stopped."""
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
        """What has happened since the last call."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events
