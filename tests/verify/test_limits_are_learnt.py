"""Limits of audits: learnt from honest noise, bounded whatever is reported, kept in a small file."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.errors import ConfigurationError, ProtocolError
from distro_optim.verify.calibrate import (
    LOOSEST,
    MAX_BYTES,
    SAMPLES_OF_A_PEER,
    TIGHTEST,
    Limits,
    Noise,
    judge,
    learn,
    of_peers,
)
from distro_optim.verify.recompute import Agreement, Evidence


def honest(count: int, seed: int = 0) -> list[Noise]:
    draw = random.Random(seed)
    return [
        Noise(
            agreement=draw.gauss(0.95, 0.01),
            excess=draw.gauss(0.25, 0.02),
            imbalance=abs(draw.gauss(0, 0.03)),
            jaccard=abs(draw.gauss(0.02, 0.005)),
            hamming=0.0,
            manhattan=abs(draw.gauss(0.2, 0.02)),
        )
        for _ in range(count)
    ]


def evidence(assigned: float, control: float, total: int = 10_000, *, sent: float = 1) -> Evidence:
    agree, beside = round(assigned * total), round(control * total)
    return Evidence(
        assigned=Agreement(agree, total),
        control=Agreement(beside, total),
        only_assigned=max(0, agree - beside) + 100,
        only_control=max(0, beside - agree) + 100,
        sent=round(total * sent),
        expected=total,
    )


@pytest.mark.parametrize("count", [16, 60, 3000])
def test_honest_peers_stay_within_what_was_learnt_from_others(count: int) -> None:
    limits = learn({bytes([n]): honest(60, n) for n in range(count // 60)} or {b"": honest(count)})
    fresh = honest(2000, seed=99)
    beyond = [n for n in fresh if n.agreement < limits.agreement or n.excess < limits.excess]  # type: ignore[operator]
    assert len(beyond) <= 4
    assert sum(n.manhattan > limits.manhattan for n in fresh) <= 4  # type: ignore[operator]
    assert 0.88 < limits.agreement < 0.93
    assert 0.1 < limits.excess < 0.2


def test_absurd_noise_moves_limits_no_further_than_their_bounds() -> None:
    noise = [Noise(agreement=0.0, excess=-1.0, imbalance=9.0, jaccard=1.0, hamming=1.0, manhattan=1e9)] * 20
    assert replace(learn({b"liar": noise}), samples=0, coverage=0.5) == LOOSEST


def test_no_noise_at_all_leaves_room_for_other_hardware() -> None:
    noise = [Noise(agreement=1.0, excess=0.5, imbalance=0.0, jaccard=0.0, hamming=0.0, manhattan=0.0)] * 20
    limits = learn({b"alike": noise})
    assert (limits.jaccard, limits.hamming, limits.manhattan) == (0.05, 0.005, 0.05)
    assert (limits.agreement, limits.excess, limits.imbalance) == (0.99, 0.5, TIGHTEST.imbalance)


def test_a_peer_counts_with_its_latest_samples_only() -> None:
    flood = [Noise(agreement=0.6)] * 5000 + [Noise(agreement=0.95)] * SAMPLES_OF_A_PEER
    limits = learn({b"flood": flood, b"other": honest(60)})
    assert limits.samples == SAMPLES_OF_A_PEER + 60
    assert limits.agreement > 0.85


def test_a_test_that_nobody_made_keeps_the_loosest_limit() -> None:
    limits = learn({b"peer": [Noise(agreement=0.9 + n / 1000) for n in range(20)]})
    assert (limits.jaccard, limits.manhattan, limits.excess) == (LOOSEST.jaccard, LOOSEST.manhattan, 0)
    assert limits.agreement > 0.8


def test_too_few_samples_are_told() -> None:
    with pytest.raises(ConfigurationError, match="16 audits or more, not from 3"):
        learn({b"peer": honest(3)})


# -- verdicts ----------------------------------------------------------------------------------------------------------

LIMITS = replace(LOOSEST, agreement=0.8, excess=0.1, imbalance=0.2)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (evidence(0.95, 0.7), []),
        (evidence(0.75, 0.5), ["agreement 0.750"]),
        (evidence(0.9, 0.85), ["excess 0.050"]),
        (evidence(0.6, 0.6), ["agreement 0.600", "excess 0.000"]),
        (evidence(0.95, 0.7, sent=0.3), ["0.30 of the coefficients"]),
        (replace(evidence(0.95, 0.7), halves=(Agreement(9, 10), Agreement(5, 10))), ["imbalance 0.400"]),
    ],
)
def test_a_verdict_names_what_speaks_against_a_result(found: Evidence, words: list[str]) -> None:
    reasons = judge(found, LIMITS)
    assert reasons is not None
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_a_few_coefficients_decide_nothing() -> None:
    assert judge(evidence(0.5, 0.5, total=399), LIMITS) is None
    assert judge(evidence(0.5, 0.5, total=400), LIMITS)
    assert judge(evidence(0.5, 0.5, total=399, sent=0.1), LIMITS)


def test_chance_is_never_honest_whatever_the_limits() -> None:
    assert judge(evidence(0.52, 0.5, total=20_000), LOOSEST)
    assert judge(evidence(0.53, 0.5, total=20_000), LOOSEST) == []


def test_batches_that_cannot_be_told_apart_speak_against_nobody() -> None:
    alike = replace(evidence(0.95, 0.95), only_assigned=0, only_control=0)
    assert judge(alike, LIMITS) == []


def test_where_nothing_was_learnt_most_peers_say_what_is_usual() -> None:
    peers = [evidence(0.95, 0.7), evidence(0.94, 0.7), evidence(0.7, 0.7), evidence(0.5, 0.5, total=10)]
    limits = of_peers(peers)
    assert limits.excess == pytest.approx(0.12)
    assert limits.agreement == pytest.approx(0.72)
    assert [bool(judge(peer, limits, sigmas=3)) for peer in peers[:3]] == [False, False, True]
    assert of_peers([]).excess == 0
    assert of_peers([evidence(0.6, 0.8)] * 3).excess == 0


# -- the file ----------------------------------------------------------------------------------------------------------


def test_limits_are_read_as_they_were_written_and_shown() -> None:
    limits = learn({b"peer": honest(40)})
    assert Limits.decode(limits.encode()) == limits
    assert "learnt from 40 honest audits" in limits.table()
    assert f"{limits.agreement:.4f}" in limits.table()
    assert "not learnt" in LOOSEST.table()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 1"),
        ({"more": 1}, "no others"),
        ({"samples": -1}, "whole number"),
        ({"samples": True}, "whole number"),
        ({"agreement": 0.4}, "looser than 0.5"),
        ({"jaccard": 0.6}, "looser than 0.5"),
        ({"excess": "0"}, "from 0 to 1"),
        ({"hamming": float("nan")}, "from 0 to 1"),
        ({"manhattan": True}, "from 0 to 1"),
    ],
)
def test_other_files_are_refused(change: dict[str, object], words: str) -> None:
    data = {"version": 1, **asdict(LIMITS), **change}
    with pytest.raises(ProtocolError, match=words):
        Limits.decode(json.dumps(data).encode())


def test_a_file_without_end_is_not_parsed() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        Limits.decode(b"[" * (MAX_BYTES + 1))
    with pytest.raises(ProtocolError, match="not JSON"):
        Limits.decode(b"[" * MAX_BYTES)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_limits_or_refused(data: bytes) -> None:
    try:
        Limits.decode(data)
    except ProtocolError:
        pass
