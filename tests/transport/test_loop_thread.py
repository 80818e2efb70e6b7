"""The network thread starts when needed, ends in time, and says no afterwards."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from distro_optim.comm.loop import CLOSE_SECONDS, LoopThread
from distro_optim.errors import NodeClosedError

pytestmark = pytest.mark.waiting


SECONDS = 20.0


async def whoami() -> threading.Thread:
    return threading.current_thread()


def test_nothing_runs_before_there_is_something_to_do() -> None:
    before = threading.active_count()
    loop = LoopThread()
    assert threading.active_count() == before
    assert loop.run(whoami(), SECONDS) is not threading.current_thread()
    assert loop.run(whoami(), SECONDS) is loop.run(whoami(), SECONDS)
    loop.stop()
    assert threading.active_count() == before


def test_hooks_are_awaited_side_by_side_and_one_that_fails_hinders_no_other(caplog: pytest.LogCaptureFixture) -> None:
    loop, done = LoopThread(), []
    both = threading.Barrier(2)

    def hook(name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await asyncio.to_thread(both.wait, SECONDS)
            done.append(name)

        return run

    async def failing() -> None:
        raise ZeroDivisionError

    async def removed() -> None:
        done.append("removed")

    for function in (hook("a"), failing, hook("b"), removed):
        loop.on_stop(function)
    loop.remove_hook(removed)
    loop.start()
    loop.stop()
    assert sorted(done) == ["a", "b"]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", ["a task", "a hook"])
def test_nothing_holds_up_the_end(stubborn: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = LoopThread()

    async def never_ends() -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                continue

    if stubborn == "a task":
        loop.submit(never_ends())
    else:
        loop.on_stop(never_ends)
    loop.run(whoami(), SECONDS)
    began = time.monotonic()
    loop.stop()
    # Some slack for a machine with other things to do.
    assert time.monotonic() - began < CLOSE_SECONDS + 1


def test_cancelled_work_can_clean_up() -> None:
    loop, cleaned = LoopThread(), threading.Event()
    begun = threading.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    loop.submit(work())
    begun.wait(SECONDS)
    loop.stop()
    assert cleaned.is_set()


def test_a_stopped_thread_takes_no_work() -> None:
    loop = LoopThread()
    loop.stop()
    loop.stop()
    with pytest.raises(NodeClosedError):
        loop.submit(whoami())


def test_waiting_ends_with_its_timeout_and_cancels_the_work() -> None:
    loop, cancelled = LoopThread(), threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(TimeoutError):
        loop.run(work(), 0.01)
    assert cancelled.wait(SECONDS)
    loop.stop()


def test_the_thread_cannot_wait_for_itself() -> None:
    loop = LoopThread()

    async def wait() -> None:
        with pytest.raises(RuntimeError, match="wait for itself"):
            loop.run(whoami())

    loop.run(wait(), SECONDS)
    loop.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is a matter of POSIX")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_neither_uses_nor_stops_its_parents_thread() -> None:
    loop = LoopThread()
    loop.run(whoami(), SECONDS)
    child = os.fork()
    if child == 0:
        try:
            loop.submit(whoami())
        except NodeClosedError:
            loop.stop()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert loop.run(whoami(), SECONDS).is_alive()
    loop.stop()
