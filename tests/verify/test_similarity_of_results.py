"""Distances between results: the reference's numbers, its float32 rounding, and the plain definitions beside ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distro_optim.errors import ProtocolError
from distro_optim.verify.similarity import (
    DistanceThresholds,
    hamming_distance,
    is_similar,
    jaccard_distance,
    manhattan_distance,
)

FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, math.nan, math.inf, 3e38])
VECTORS = arrays(np.float32, st.integers(0, 12), elements=FEW_VALUES)


@pytest.mark.parametrize(
    ("a", "b", "jaccard", "manhattan", "hamming"),
    [
        ([1, 2, 3], [4, 5, 6], 1, 9, 1),
        ([1, 2, 5], [1, 2, 3], 0.5, 2, 1 / 3),
        ([1, 2, 3], [1, 2, 3], 0, 0, 0),
        ([0.1, 0.2, 0.3], [0.1, 0.3, 1.0], 0.5, 0.8, 2 / 3),
        ([0.1, 0.2, 0.3], [0.4, 0.5, 9.1], 1, 9.4, 1),
        ([1.5, 2.5, 3.5, 4.5], [2.5, 3.5, 5.5, 1.1], 2 / 3, 7.4, 1),
        ([100, 200, 300, 1000], [100, 150, 250, 300], 2 / 3, 800, 0.75),
    ],
)
def test_distances_of_the_reference(
    a: list[float], b: list[float], jaccard: float, manhattan: float, hamming: float
) -> None:
    assert jaccard_distance(a, b) == pytest.approx(jaccard, abs=1e-6)
    assert manhattan_distance(a, b) == pytest.approx(manhattan, abs=1e-6)
    assert hamming_distance(a, b) == pytest.approx(hamming, abs=1e-6)


def test_empty_results_have_a_jaccard_distance_only() -> None:
    assert jaccard_distance([], []) == 0.0
    for distance in (manhattan_distance, hamming_distance):
        with pytest.raises(ProtocolError, match="must not be empty"):
            distance([], [])


def test_lengths_that_differ_have_a_jaccard_distance_only() -> None:
    assert jaccard_distance([1, 2, 3], [1, 2]) == pytest.approx(1 / 3)
    for distance in (manhattan_distance, hamming_distance):
        with pytest.raises(ProtocolError, match="same length, got 3 and 2"):
            distance([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("a", "b", "thresholds", "similar"),
    [
        ([1, 2, 3], [1, 2, 3], (0.1, 1, 0.1), True),
        ([1, 2, 3], [1, 2, 5], (0.6, 3, 0.5), True),
        ([1, 2, 3], [1, 5, 7], (0.8, 2, 0.8), False),
        ([1, 2, 3], [4, 5, 6], (1, 10, 0.3), False),
        ([1, 2, 3], [4, 5, 6], (0.5, 10, 1), False),
    ],
)
def test_verdicts_of_the_reference(
    a: list[float], b: list[float], thresholds: tuple[float, float, float], similar: bool
) -> None:
    assert is_similar(a, b, DistanceThresholds(*thresholds)) is similar


def test_a_nan_cannot_switch_the_verdict_off() -> None:
    assert not is_similar([1.0, math.nan], [1.0, 2.0], DistanceThresholds(1, 1e9, 1))


@pytest.mark.slow
@given(VECTORS, VECTORS)
def test_jaccard_agrees_with_its_plain_definition(a: np.ndarray, b: np.ndarray) -> None:
    common = sum(any(y == x for x in a) for y in b)
    union = len(a) + sum(not any(y == x for x in a) for y in b)
    expected = float(np.float32(1) - np.float32(common) / np.float32(union)) if union else 0.0
    assert jaccard_distance(a, b) == expected


@pytest.mark.slow
@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e3, 1e3, width=32)), st.randoms())
def test_manhattan_adds_in_float32_and_in_order(a: np.ndarray, random: object) -> None:
    b = np.roll(a, 1)
    total = np.float32(0)
    for x, y in zip(a, b, strict=True):
        total += abs(x - y)
    assert manhattan_distance(a, b) == float(total)


@pytest.mark.slow
def test_a_million_entries_give_the_distances_of_a_sort() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=1_000_000).astype(np.float32)
    b = a.copy()
    b[::10] = rng.normal(size=100_000).astype(np.float32)
    rng.shuffle(b[: len(b) // 2])
    common = int(np.isin(b, a).sum())
    assert jaccard_distance(a, b) == float(np.float32(1) - np.float32(common) / np.float32(2_000_000 - common))
    assert hamming_distance(a, b) == float(np.float32((a != b).sum()) / np.float32(1_000_000))
