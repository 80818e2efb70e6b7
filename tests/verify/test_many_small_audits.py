"""Many audits of one peer, each too small to say anything, add up to a verdict."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

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
    assert sorted(needed)[150] <= 6
    assert max(needed) <= 20
    assert min(needed) == 4


def test_honesty_cannot_be_saved_up() -> None:
    balance = Balance()
    for _ in range(1000):
        balance.add(0.9, USUAL)
    verdicts = [balance.add(0.5, USUAL) for _ in range(10)]
    assert False in verdicts


def test_no_three_audits_fail_anybody() -> None:
    balance = Balance()
    assert [balance.add(0.0, USUAL) for _ in range(4)] == [None, None, None, False]
    assert Usual(0.9, 0.03).weigh(0.5) == -MOST
    assert FAILS > 3 * MOST


def an_honest(draw: random.Random, *, unlike: float = 0.04) -> float:
    """A siding of an honest peer, whose batch is unlike all others now and then: then it says what chance would."""
    return draw.gauss(0.5, 0.08) if draw.random() < unlike else min(1.0, draw.gauss(0.85, 0.1))


def test_results_that_look_untrained_now_and_then_fail_no_honest_peer() -> None:
    draw, balance = random.Random(5), Balance()
    samples = {bytes([n]): [an_honest(draw) for _ in range(32)] for n in range(3)}
    for _ in range(1000):
        samples = {key: [*own[1:], an_honest(draw)] for key, own in samples.items()}
        usual = usual_of(samples)
        assert usual is not None
        assert False not in [balance.add(an_honest(draw), usual) for _ in range(100)]


def test_three_of_them_one_after_another_fail_no_honest_peer() -> None:
    draw, balance = random.Random(6), Balance()
    usual = usual_of({bytes([n]): [an_honest(draw) for _ in range(32)] for n in range(3)})
    assert usual is not None
    for _ in range(2000):
        verdicts = [balance.add(0.45, usual) for _ in range(3)]
        verdicts += [balance.add(an_honest(draw, unlike=0.0), usual) for _ in range(9)]
        assert False not in verdicts


KINDS: dict[str, Callable[[random.Random], float]] = {
    "alike": lambda draw: draw.gauss(0.66, 0.01),
    "a long tail": an_honest,
    "a longer one": lambda draw: an_honest(draw, unlike=0.3),
    "two groups": lambda draw: draw.choice([0.55, 0.95]),
    "even": lambda draw: draw.uniform(0.4, 1.0),
    "hardly above chance": lambda draw: draw.gauss(0.51, 0.05),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [2, 32])
def test_whatever_honest_numbers_scatter_like_they_weigh_less_than_one_on_average(kind: str, known: int) -> None:
    draw, weights = random.Random(7), []
    for _ in range(300):
        usual = usual_of({bytes([n]): [KINDS[kind](draw) for _ in range(known)] for n in range(4)})
        assert usual is not None
        weights += [math.exp(-usual.weigh(KINDS[kind](draw))) for _ in range(20)]
    # Its mean may be 1, and that of so many is up to a tenth more.
    assert statistics.fmean(weights) < 1.1


def test_while_few_honest_numbers_are_known_an_audit_says_little() -> None:
    for of_each in (2, 4, 8):
        usual = usual_of({bytes([n]): [0.9] * of_each for n in range(3)})
        assert usual is not None
        assert usual.weigh(0.4) == pytest.approx(-min(MOST, math.log(3 * of_each + 1)), abs=0.3)


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
        assert told.weigh(0.5) < -0.8, "who trains nothing still fails"
        balance = Balance()
        assert False not in [balance.add(draw.gauss(0.66, 0.05), told) for _ in range(10_000)]


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
    assert [untrained.add(0.5, usual) for _ in range(4)] == [None, None, None, False]


def test_a_result_that_leaves_most_out_counts_as_not_trained() -> None:
    assert siding(90, 10, sent=1000, expected=1000) == 0.9
    assert siding(90, 10, sent=400, expected=1000) == 0.5
    assert siding(0, 0, sent=0, expected=1000) == 0.5
    assert siding(LEAST_TELLING - 1, 0, sent=1000, expected=1000) is None
