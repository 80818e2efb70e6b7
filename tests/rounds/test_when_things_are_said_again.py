"""Repetitions: none in a round that goes well, soon in one that waits."""

from __future__ import annotations

import pytest

from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.types import Committee, CommitteeProof, MerkleRoot
from distro_optim.strategy.rounds.actions import Announce, Outbox
from distro_optim.strategy.rounds.announcer import (
    AMONG_PSYCHES,
    FIRST_REPEAT_SECONDS,
    PROMPT,
    REBROADCAST_SECONDS,
    REPEAT_SECONDS_PER_CLIENT,
    Announcer,
)
from distro_optim.strategy.rounds.broadcasts import Finished
from distro_optim.strategy.rounds.waiting import UNHEARD_SECONDS

PROOF = CommitteeProof(Committee.TRAINER, 0, 0)
TRAINING_SECONDS = 3.0


def announcer_that_said_something(*, among_psyches: bool = False, clients: int = 2) -> tuple[Announcer, Outbox]:
    outbox = Outbox()
    announcer = Announcer(SecretKey(bytes(32)), bytes, outbox)
    announcer.repeats.pace = AMONG_PSYCHES if among_psyches else PROMPT.among(clients)
    announcer.say(1, PROOF, bytes(32), Finished(MerkleRoot(bytes(32)), warmup=False), 0.0)
    outbox.take()
    return announcer, outbox


def repeated(announcer: Announcer, outbox: Outbox, now: float) -> int:
    announcer.repeat(now)
    return sum(isinstance(action, Announce) for action in outbox.take())


def test_what_was_said_is_repeated_after_a_second_by_who_does_not_train() -> None:
    announcer, outbox = announcer_that_said_something()
    assert announcer.repeats.next_at == FIRST_REPEAT_SECONDS
    assert repeated(announcer, outbox, FIRST_REPEAT_SECONDS) == 1


def test_while_we_train_nothing_is_repeated_and_soon_afterwards_it_is() -> None:
    announcer, outbox = announcer_that_said_something()
    announcer.repeats.hold()
    assert announcer.repeats.next_at == REBROADCAST_SECONDS
    assert repeated(announcer, outbox, TRAINING_SECONDS) == 0
    announcer.repeats.release(TRAINING_SECONDS)
    assert announcer.repeats.next_at == TRAINING_SECONDS + FIRST_REPEAT_SECONDS
    assert repeated(announcer, outbox, TRAINING_SECONDS) == 0
    assert repeated(announcer, outbox, TRAINING_SECONDS + FIRST_REPEAT_SECONDS) == 1


def test_a_long_training_is_no_reason_to_be_silent_for_longer_than_ten_seconds() -> None:
    announcer, outbox = announcer_that_said_something()
    announcer.repeats.hold()
    assert [repeated(announcer, outbox, float(now)) for now in range(1, 25)].count(1) == 2


def test_a_training_that_is_stopped_holds_nothing_back() -> None:
    announcer, outbox = announcer_that_said_something()
    announcer.repeats.hold()
    announcer.repeats.release()
    assert repeated(announcer, outbox, FIRST_REPEAT_SECONDS) == 1


def test_among_psyches_clients_training_changes_nothing() -> None:
    announcer, outbox = announcer_that_said_something(among_psyches=True)
    announcer.repeats.hold()
    assert announcer.repeats.next_at == REBROADCAST_SECONDS
    announcer.repeats.release(REBROADCAST_SECONDS)
    assert repeated(announcer, outbox, REBROADCAST_SECONDS) == 1


@pytest.mark.parametrize("clients", [1, 16, 100])
def test_to_a_hundred_peers_what_was_said_is_repeated_as_soon_as_between_two(clients: int) -> None:
    announcer, _ = announcer_that_said_something(clients=clients)
    assert announcer.repeats.next_at == FIRST_REPEAT_SECONDS


def test_among_more_the_first_repetition_comes_later_and_the_second_still_while_anybody_waits() -> None:
    announcer, outbox = announcer_that_said_something(clients=256)
    first = 256 * REPEAT_SECONDS_PER_CLIENT
    assert announcer.repeats.next_at == pytest.approx(first)
    announcer.repeats.hold()
    announcer.repeats.release(TRAINING_SECONDS)
    assert announcer.repeats.next_at == pytest.approx(TRAINING_SECONDS + first)
    assert repeated(announcer, outbox, TRAINING_SECONDS + first) == 1
    second = announcer.repeats.next_at
    assert second is not None
    assert second - TRAINING_SECONDS < UNHEARD_SECONDS
    assert repeated(announcer, outbox, second) == 1
    third = announcer.repeats.next_at
    assert third is not None
    assert third - second == pytest.approx(4 * FIRST_REPEAT_SECONDS)
