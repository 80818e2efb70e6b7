"""Many audits of one peer, each too small to say anything, add up to a verdict."""

from __future__ import annotations

import random

import pytest

from distro_optim.verify.sequential import FAILS, LEAST_TELLING, MOST, Balance, Usual, siding, usual_of

USUAL = Usual(0.66, 0.06)
"""As measured: a byte transformer of 0.4M parameters, 928 coefficients a round, batches of 256 bytes."""


def test_no_honest_peer_fails_in_ten_thousand_audits() -> None:
    draw, balance, passed = random.Random(1), Balance(), 0
    for _ in range(10_000):
        verdict = balance.add(draw.gauss(USUAL.middle, USUAL.scatter), USUAL)
        assert verdict is not False
        passed += verdict is True
    assert passed > 1000


def test_who_trains_nothing_fails_within_a_few_audits() -> None:
    draw = random.Random(2)
    needed = []
    for _ in range(300):
        balance, count = Balance(), 1
        while (verdict := balance.add(draw.gauss(0.5, USUAL.scatter), USUAL)) is None:
            count += 1
        assert verdict is False
        needed.append(count)
    assert sorted(needed)[150] <= 5
    assert max(needed) <= 20


def test_honesty_cannot_be_saved_up() -> None:
    balance = Balance()
    for _ in range(1000):
        balance.add(0.9, USUAL)
    verdicts = [balance.add(0.5, USUAL) for _ in range(10)]
    assert False in verdicts


def test_no_single_audit_fails_anybody() -> None:
    assert Balance().add(0.0, USUAL) is None
    assert Usual(0.9, 0.03).weigh(0.5) == -MOST
    assert FAILS > MOST


def test_where_honest_results_do_not_stand_out_nothing_is_said() -> None:
    balance = Balance()
    assert all(balance.add(0.3, Usual(0.5, 0.03)) is None for _ in range(100))


def test_less_than_half_of_the_peers_cannot_move_what_is_usual() -> None:
    draw = random.Random(3)
    honest = {bytes([n]): [draw.gauss(0.66, 0.05) for _ in range(20)] for n in range(4)}
    true = usual_of(honest)
    for lie in ([0.5] * 32, [1.0] * 1000, [0.0, 1.0] * 50):
        told = usual_of({**honest, b"x": lie, b"y": lie, b"z": lie})
        assert true is not None
        assert told is not None
        assert told.middle == pytest.approx(true.middle, abs=0.06)
        assert told.scatter < 2.5 * true.scatter


def test_little_is_nothing_usual() -> None:
    assert usual_of({}) is None
    assert usual_of({b"a": [0.7] * 3, b"b": [0.7] * 2, b"c": []}) is None
    usual = usual_of({b"a": [0.7] * 3, b"b": [0.7] * 3})
    assert usual is not None
    assert usual.scatter == pytest.approx(0.05), "a quarter of the way from chance: others scatter more than these"


def test_honest_results_that_are_less_alike_than_usual_do_not_fail() -> None:
    draw, balance = random.Random(4), Balance()
    usual = usual_of({bytes([n]): [1.0] * 8 for n in range(4)})
    assert usual is not None
    for _ in range(2000):
        assert balance.add(draw.choice([1.0, 0.95, 0.9, 0.75]), usual) is not False
    untrained = Balance()
    assert [untrained.add(0.5, usual) for _ in range(2)] == [None, False]


def test_a_result_that_leaves_most_out_counts_as_not_trained() -> None:
    assert siding(90, 10, sent=1000, expected=1000) == 0.9
    assert siding(90, 10, sent=400, expected=1000) == 0.5
    assert siding(0, 0, sent=0, expected=1000) == 0.5
    assert siding(LEAST_TELLING - 1, 0, sent=1000, expected=1000) is None
