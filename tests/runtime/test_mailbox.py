"""Between the threads: what is put in comes out in order, cancelling overtakes, an end is told."""

from __future__ import annotations

import threading

import pytest

from distro_optim.coordinator.types import BatchId
from distro_optim.errors import RunError
from distro_optim.strategy.network.mailbox import Mailbox
from distro_optim.strategy.rounds.actions import Desynced, HashWeights, TrainBatch

pytestmark = [pytest.mark.waiting]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def train(step: int) -> TrainBatch:
    return TrainBatch(
        step=step, batch=BatchId(0, 1), lr=0.1, previous_lr=0.1, bounds=None, zero_optim=False, own_previous=None
    )


def test_actions_come_out_in_their_order() -> None:
    mailbox = Mailbox(Clock())
    for step in range(5):
        mailbox.put(HashWeights(step))
    assert [mailbox.take() for _ in range(5)] == [HashWeights(step) for step in range(5)]


def test_nothing_in_time_is_none() -> None:
    assert Mailbox(Clock()).take(0.0) is None


def test_who_waits_gets_what_another_thread_puts_in() -> None:
    clock = Clock()
    mailbox = Mailbox(clock)
    other = threading.Thread(target=mailbox.put, args=(HashWeights(1),))
    other.start()
    assert mailbox.take() == HashWeights(1)
    other.join()


def test_a_cancelled_step_is_known_before_its_training_is_taken() -> None:
    mailbox = Mailbox(Clock())
    mailbox.put(train(3))
    mailbox.cancel(3)
    assert mailbox.is_cancelled(3)
    assert not mailbox.is_cancelled(4)
    assert mailbox.take() == train(3)


def test_a_failure_is_raised_at_once_and_again_and_ends_all_training() -> None:
    mailbox = Mailbox(Clock())
    mailbox.put(train(3))
    mailbox.fail(RunError("gone"))
    mailbox.fail(RunError("later"))
    assert mailbox.is_cancelled(3)
    for _ in range(2):
        with pytest.raises(RunError, match="gone"):
            mailbox.take()


def test_an_end_lets_what_is_there_be_done_first() -> None:
    mailbox = Mailbox(Clock())
    mailbox.put(HashWeights(1))
    mailbox.end(RunError("over"))
    assert mailbox.take() == HashWeights(1)
    with pytest.raises(RunError, match="over"):
        mailbox.take()


def test_the_time_of_waiting_and_of_training_is_kept() -> None:
    clock = Clock()
    mailbox = Mailbox(clock)
    mailbox.put(train(1))
    mailbox.take()
    clock.now += 2.5
    mailbox.answered(trained=True)
    clock.now += 9.0
    mailbox.answered(trained=False)
    assert mailbox.seconds_training == 2.5
    assert mailbox.seconds_waiting == 0.0
    assert (mailbox.rounds_trained, mailbox.rounds_cancelled) == (1, 1)


def test_of_events_that_nobody_takes_the_oldest_go() -> None:
    mailbox = Mailbox(Clock())
    for step in range(1000):
        mailbox.put_event(Desynced(step=step, reason="test"))
    events = mailbox.take_events()
    assert 0 < len(events) < 1000
    assert events[-1] == Desynced(step=999, reason="test")
    assert mailbox.take_events() == []
