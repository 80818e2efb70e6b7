"""Repetitions: none in a round that goes well, soon in one that waits."""

from __future__ import annotations

from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.types import Committee, CommitteeProof, MerkleRoot
from distro_optim.strategy.rounds.actions import Announce, Outbox
from distro_optim.strategy.rounds.announcer import (
    AMONG_PSYCHES,
    FIRST_REPEAT_SECONDS,
    REBROADCAST_SECONDS,
    Announcer,
)
from distro_optim.strategy.rounds.broadcasts import Finished

PROOF = CommitteeProof(Committee.TRAINER, 0, 0)
TRAINING_SECONDS = 3.0


def announcer_that_said_something(*, among_psyches: bool = False) -> tuple[Announcer, Outbox]:
    outbox = Outbox()
    announcer = Announcer(SecretKey(bytes(32)), bytes, outbox)
    if among_psyches:
        announcer.repeats.pace = AMONG_PSYCHES
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
