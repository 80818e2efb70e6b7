"""The clock of runs in memory jumps ahead when all wait, and never while somebody works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from distro_optim.strategy.rounds import actions as act
from runtime.hurry import CountedMailbox, HurriedThread, HurryingClock

pytestmark = [pytest.mark.waiting]

HOUR = 3600.0
PATIENCE_SECONDS = 30.0


@pytest.fixture
def thread() -> Iterator[HurriedThread]:
    made = HurriedThread("hurried")
    yield made
    made.stop()


def turns(thread: HurriedThread) -> None:
    """The loop goes round a few times."""
    for _ in range(3):
        thread.run(asyncio.sleep(0.005), PATIENCE_SECONDS)


def test_an_hour_is_over_at_once(thread: HurriedThread) -> None:
    before = thread.clock.time()
    with thread.clock.waiting(lambda: False):
        thread.run(asyncio.sleep(HOUR), PATIENCE_SECONDS)
    assert thread.clock.time() - before >= HOUR


@pytest.mark.parametrize(
    ("works", "wanted"),
    [(True, lambda: False), (False, lambda: True), (False, None)],
    ids=["a thread works", "what the test waits for is so", "the test does not wait"],
)
def test_whoever_works_stops_it(thread: HurriedThread, works: bool, wanted: Callable[[], bool] | None) -> None:
    hour = thread.submit(asyncio.sleep(HOUR))
    if works:
        thread.clock.begin()
    if wanted is None:
        turns(thread)
    else:
        with thread.clock.waiting(wanted):
            turns(thread)
    assert not hour.done()
    if works:
        thread.clock.end()
    with thread.clock.waiting(lambda: False):
        hour.result(PATIENCE_SECONDS)


def test_a_thread_works_from_what_it_is_given_until_it_asks_for_more() -> None:
    clock = HurryingClock()
    mailbox = CountedMailbox(clock)
    with clock.waiting(lambda: False):
        assert clock.all_wait
        mailbox.put(act.HashWeights(1))
        mailbox.put(act.HashWeights(2))
        for _ in range(2):
            assert not clock.all_wait
            assert mailbox.take() is not None
            assert not clock.all_wait
        assert mailbox.take(0.0) is None
        assert clock.all_wait


@pytest.mark.parametrize("leaves_first", [True, False])
def test_what_a_thread_leaves_behind_is_no_work(leaves_first: bool) -> None:
    clock = HurryingClock()
    mailbox = CountedMailbox(clock)
    for step in (1, 2, 3):
        mailbox.put(act.HashWeights(step))
    mailbox.take()
    gone: list[Callable[[], None]] = [mailbox.leave, lambda: mailbox.fail(RuntimeError("gone"))]
    for go in gone if leaves_first else gone[::-1]:
        go()
    mailbox.put(act.HashWeights(4))
    with clock.waiting(lambda: False):
        assert clock.all_wait
