"""Where ``exact-1`` rounds by floats: equal to whole numbers and fractions, next to every half and at it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from distro_optim.compress.exact import means
from distro_optim.compress.exact.definition import MAX_CONTRIBUTORS, VALUE_BITS
from distro_optim.compress.profile import ACCELERATOR, CPU, Profile

LARGEST = 1 << VALUE_BITS


COUNTS = [*range(1, 34), 63, 64, 65, 127, 128, 129, *range(MAX_CONTRIBUTORS - 3, MAX_CONTRIBUTORS + 1)]


def near_halves(dtype: torch.dtype, first: int, last: int) -> Tensor:
    """All halves and whole numbers from ``first`` to ``last``, with two neighbours on each side, of both signs."""
    points = torch.arange(2 * first, 2 * last + 1, dtype=torch.float64).div_(2).to(dtype).numpy()
    found = [points]
    for direction in (-np.inf, np.inf):
        step = np.nextafter(points, np.asarray(direction, points.dtype))
        found += [step, np.nextafter(step, np.asarray(direction, points.dtype))]
    both = np.concatenate(found)
    return torch.from_numpy(np.concatenate([both, -both]))


def half_away_from_zero(value: float) -> int:
    exact = abs(Fraction(value))
    magnitude = (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
    return magnitude if value >= 0 else -magnitude


@pytest.mark.parametrize(("dtype", "fraction"), [(torch.float32, 23), (torch.float64, 52)])
@pytest.mark.parametrize("first", [0, 1000, LARGEST - 40])
def test_values_are_rounded_to_the_nearest_and_halves_away_from_zero(
    dtype: torch.dtype, fraction: int, first: int
) -> None:
    values = near_halves(dtype, first, first + 40)
    expected = [half_away_from_zero(value) for value in values.tolist()]
    assert [int(value) for value in means._rounded(values.clone(), fraction).tolist()] == expected


def test_so_are_values_next_to_all_halves() -> None:
    values = near_halves(torch.float32, 0, LARGEST)
    exact = values.double()  # in which a half is added without rounding
    expected = torch.copysign((exact.abs() + 0.5).floor(), exact).float()
    assert torch.equal(means._rounded(values.clone(), 23), expected)


@pytest.mark.parametrize("profile", [CPU, ACCELERATOR], ids=["a CPU", "where quotients are approximate"])
def test_means_of_values_are_rounded_to_the_nearest_and_halves_away_from_zero(profile: Profile) -> None:
    for count in COUNTS:
        # Next to (k + 1/2) * count, for all k: the nearest sums on both sides of a tie, and the tie.
        ties = (2 * np.arange(LARGEST, dtype=np.int64) + 1) * count // 2
        sums = np.concatenate([ties - 1, ties, ties + 1, [0, LARGEST * count]])
        sums = np.concatenate([sums, -sums])
        sums = sums[abs(sums) <= LARGEST * count]
        expected = np.sign(sums) * ((2 * abs(sums) + count) // (2 * count))
        total = torch.from_numpy(sums).to(torch.float32)
        assert torch.equal(
            means._divided(total, torch.full_like(total, count), profile), torch.from_numpy(expected).to(torch.float32)
        )


@pytest.mark.parametrize("contributors", [2, 31])
def test_a_sum_and_a_count_are_taken_out_of_one_number(contributors: int) -> None:
    for largest in (LARGEST, -LARGEST):
        index = torch.zeros(1, contributors, dtype=torch.int64)
        value = torch.full((1, contributors), float(largest))
        total, count = means._sum_and_count(index, value, None, contributors, torch.empty(1, 2))
        assert total.tolist() == [[largest * contributors] * contributors]
        assert count.tolist() == [[contributors] * contributors]
