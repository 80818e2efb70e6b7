"""A clock that jumps ahead while everybody waits, for runs in memory: what takes a minute there is over at once.

A run in memory knows no time but that of its event loop. :class:`HurriedThread` has a loop whose clock goes as that of
the machine while anybody has something to do: the loop, a training thread, a thread that encodes, or the test. When
all of them wait, and the test does so for something that is not the case yet, the clock goes to what the loop has to do
next. However busy the machine is, nobody comes too late by that: whoever works stops the clock.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Final, TypeVarTuple

from typing_extensions import override

from distro_optim.comm.loop import LoopThread
from distro_optim.strategy.network.mailbox import Mailbox
from distro_optim.strategy.port import TrainerAction

__all__ = ["CountedMailbox", "HurriedThread", "HurryingClock"]

LOOK_SECONDS: Final = 0.001
"""How often the loop looks whether somebody still works."""

Ts = TypeVarTuple("Ts")


class HurryingClock:
    """Seconds, and who has something to do. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work = 0
        self._skipped = 0.0
        self._wanted: Callable[[], object] | None = None

    def time(self) -> float:
        """Monotonic seconds."""
        return time.monotonic() + self._skipped

    def begin(self) -> None:
        """Somebody has one thing more to do."""
        with self._lock:
            self._at_work += 1

    def end(self, count: int = 1) -> None:
        """It is done, and what follows from it is known to the loop."""
        with self._lock:
            self._at_work -= count

    @contextmanager
    def waiting(self, wanted: Callable[[], object]) -> Iterator[None]:
        """For the time of the block the test waits for this."""
        self._wanted = wanted
        try:
            yield
        finally:
            self._wanted = None

    @property
    def all_wait(self) -> bool:
        """Nobody has anything to do before a timer of the loop is due."""
        wanted = self._wanted
        return not self._at_work and wanted is not None and not wanted()

    def skip(self, seconds: float) -> None:
        """Lets so many seconds pass."""
        self._skipped += seconds


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: HurryingClock) -> None:
        super().__init__()
        self._clock = clock

    @override
    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        due = self._clock.time() + timeout
        while (left := due - self._clock.time()) > 0:
            all_wait = self._clock.all_wait
            # What the last one that worked has told the loop was told before it said that it is done.
            if ready := super().select(0.0 if all_wait else min(left, LOOK_SECONDS)):
                return ready
            if all_wait:
                self._clock.skip(left)
        return []


class _HurryingLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: HurryingClock) -> None:
        self._clock = clock
        super().__init__(_Selector(clock))

    @override
    def time(self) -> float:
        return self._clock.time()

    @override
    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], Any], *args: *Ts) -> asyncio.Future[Any]:
        self._clock.begin()
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(lambda _: self._clock.end())
        return future


class HurriedThread(LoopThread):
    """A loop in a thread, with a clock that jumps.

    Attributes:
        clock: its time.
    """

    def __init__(self, name: str) -> None:
        self.clock = HurryingClock()
        super().__init__(name, new_loop=lambda: _HurryingLoop(self.clock))

    def sleep(self, seconds: float) -> None:
        """Another thread, which has something to do, lets so much time pass."""
        over = threading.Event()

        def wake() -> None:
            self.clock.begin()
            over.set()

        loop = self.start()
        loop.call_soon_threadsafe(loop.call_later, seconds, wake)
        self.clock.end()
        over.wait()


class CountedMailbox(Mailbox):
    """Says what its owner has to do: what was put into it, and what was taken, until the owner asks for more."""

    def __init__(self, clock: HurryingClock) -> None:
        super().__init__(time.monotonic)
        self._at_work = clock
        self._has_one = False
        self._has_left = False

    @override
    def put(self, action: TrainerAction) -> None:
        with self._changed:
            if not self._has_left:
                self._at_work.begin()
            super().put(action)

    @override
    def fail(self, error: BaseException) -> None:
        with self._changed:
            if not self._has_left:
                self._at_work.end(len(self._actions))
            super().fail(error)

    @override
    def take(self, timeout: float | None = None) -> TrainerAction | None:
        if self._has_one:
            self._has_one = False
            self._at_work.end()
        action = super().take(timeout)
        self._has_one = action is not None
        return action

    def leave(self) -> None:
        """The owner takes nothing any more."""
        with self._changed:
            if not self._has_left:
                self._has_left = True
                self._at_work.end(len(self._actions) + self._has_one)
