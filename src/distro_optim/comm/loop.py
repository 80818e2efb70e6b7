"""An asyncio event loop in a thread of its own, for callers that have none.

Training code is synchronous; the network is not. The loop's thread is a daemon, so a program that ends, by return,
exception or Ctrl-C, is never held up by it; what must still be said to peers is said by close hooks that run at
interpreter exit within a bounded time.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from ..errors import NodeClosedError

__all__ = ["CLOSE_SECONDS", "LoopThread"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 2.0
"""All of closing, hooks and tasks together, ends within this time."""

# Shares of the above: for the close hooks, for cancelled tasks to unwind, and once more for those that did not.
_HOOKS_SHARE: Final = 0.6
_TASKS_SHARE: Final = 0.2
_LAST_SECONDS: Final = 0.1

_running: weakref.WeakSet[LoopThread] = weakref.WeakSet()


class LoopThread:
    """One event loop in one thread, started by the first thing it is given to do.

    Every method may be called from any thread; those that wait refuse to be called on the loop's own thread, where
    they would never return.

    Args:
        name: of the thread.
        new_loop: makes the loop. A test may have one with a clock of its own.
    """

    def __init__(
        self,
        name: str = "distro-optim-network",
        *,
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self._name = name
        self._new_loop = new_loop
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._pid = 0
        self._hooks: list[Callable[[], Awaitable[None]]] = []

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return self._thread is threading.current_thread()

    def start(self) -> asyncio.AbstractEventLoop:
        """The running loop, started if need be.

        Raises:
            NodeClosedError: it was stopped, or belongs to the parent of this forked process.
        """
        with self._lock:
            if self._stopped:
                raise NodeClosedError("the network thread is stopped; make a new node")
            if self._loop is not None:
                if self._pid != os.getpid():
                    raise NodeClosedError("a forked process cannot use its parent's network thread; make a new node")
                return self._loop
            loop = self._new_loop()
            started = threading.Event()
            thread = threading.Thread(target=self._main, args=(loop, started), name=self._name, daemon=True)
            thread.start()
            started.wait()
            self._loop, self._thread, self._pid = loop, thread, os.getpid()
            _running.add(self)
            return loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs ``coroutine`` on the loop; the future can be waited for, polled or cancelled from any thread."""
        try:
            loop = self.start()
        except NodeClosedError:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Runs ``coroutine`` on the loop and waits for its result.

        Raises:
            TimeoutError: not done in ``timeout`` seconds; it is cancelled.
            RuntimeError: called on the loop's own thread.
        """
        if self.is_current:
            coroutine.close()
            raise RuntimeError("this would wait for itself: await the asynchronous method instead")
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def on_stop(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Has ``hook`` awaited, beside the other hooks, before the loop stops."""
        self._hooks.append(hook)

    def remove_hook(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Takes back :meth:`on_stop`."""
        if hook in self._hooks:
            self._hooks.remove(hook)

    def stop(self, timeout: float = CLOSE_SECONDS) -> None:
        """Awaits the hooks, cancels what still runs, ends the thread. Idempotent; takes at most ``timeout`` seconds."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            loop, thread = self._loop, self._thread
        _running.discard(self)
        if loop is None or thread is None or self._pid != os.getpid():
            return
        if self.is_current:
            raise RuntimeError("a loop cannot wait for its own end: stop it from another thread")
        deadline = time.monotonic() + timeout
        # Not via submit, which refuses new work from now on.
        shutdown = asyncio.run_coroutine_threadsafe(self._shutdown(timeout), loop)
        try:
            shutdown.result(timeout)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            _log.warning("closing took longer than %.1f s and was cut short", timeout)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(max(0.0, deadline - time.monotonic()) + 2 * _LAST_SECONDS)

    async def _shutdown(self, timeout: float) -> None:
        hooks = [asyncio.ensure_future(_quietly(hook)) for hook in self._hooks]
        if hooks:
            await asyncio.wait(hooks, timeout=timeout * _HOOKS_SHARE)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout * _TASKS_SHARE)
        await asyncio.get_running_loop().shutdown_asyncgens()

    @staticmethod
    def _main(loop: asyncio.AbstractEventLoop, started: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(started.set)
        try:
            loop.run_forever()
        finally:
            # Empty, unless the time was up before everything had unwound.
            late = asyncio.all_tasks(loop)
            for task in late:
                task.cancel()
            if late:
                _, late = loop.run_until_complete(asyncio.wait(late, timeout=_LAST_SECONDS))
            for task in late:
                # It is known and logged; what asyncio would print when it is destroyed tells a user nothing.
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()


async def _quietly(hook: Callable[[], Awaitable[None]]) -> None:
    try:
        await hook()
    except Exception:
        _log.exception("a close hook failed")


@atexit.register
def _stop_all() -> None:
    """Daemon threads still run while atexit hooks do, so peers can be told that we leave."""
    for thread in list(_running):
        thread.stop()
