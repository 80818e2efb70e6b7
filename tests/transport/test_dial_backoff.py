"""The waits between dials: they double, they are bounded, they are forgotten."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.backoff import BackoffPolicy, DialSchedule
from distro_optim.errors import ConfigurationError

pytestmark = pytest.mark.waiting


PEER, OTHER = b"\1" * 32, b"\2" * 32
EXACT = BackoffPolicy(first=1.0, factor=2.0, longest=10.0, jitter=0.0)


def test_the_wait_doubles_up_to_its_bound() -> None:
    schedule = DialSchedule(EXACT, Random(0).random)
    assert [schedule.failed(PEER, 0.0) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_peer_may_be_dialled_when_its_wait_is_over() -> None:
    schedule = DialSchedule(EXACT, Random(0).random)
    assert schedule.wait(PEER, 100.0) == 0.0
    schedule.failed(PEER, 100.0)
    assert schedule.wait(PEER, 100.25) == 0.75
    assert schedule.wait(PEER, 101.0) == 0.0
    assert schedule.wait(OTHER, 100.25) == 0.0


def test_a_success_forgets_the_failures() -> None:
    schedule = DialSchedule(EXACT, Random(0).random)
    for _ in range(5):
        schedule.failed(PEER, 0.0)
    schedule.succeeded(PEER)
    assert schedule.wait(PEER, 0.0) == 0.0
    assert schedule.failed(PEER, 0.0) == 1.0


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_every_wait_is_positive_and_bounded(failures: int, draw: float) -> None:
    policy = BackoffPolicy(first=0.5, longest=30.0, jitter=0.5)
    assert 0.25 <= policy.delay(failures, draw) <= 30.0


def test_jitter_parts_peers_that_lost_the_same_neighbour() -> None:
    policy = BackoffPolicy(jitter=0.5)
    draw = Random(7).random
    assert len({policy.delay(3, draw()) for _ in range(20)}) == 20


def test_the_table_of_failures_is_bounded() -> None:
    schedule = DialSchedule(EXACT, Random(0).random, max_peers=5)
    for number in range(100):
        schedule.failed(number.to_bytes(32, "big"), 0.0)
    assert len(schedule) == 5
    assert schedule.failures((99).to_bytes(32, "big")) == 1


@pytest.mark.parametrize(
    "options", [{"first": 0}, {"first": 5, "longest": 1}, {"factor": 0.5}, {"jitter": 1.5}, {"jitter": -0.1}]
)
def test_impossible_policies_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        BackoffPolicy(**options)
