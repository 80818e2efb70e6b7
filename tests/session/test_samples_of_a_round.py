"""Every sample of a dataset is trained once per pass across the swarm, and pieces of a share weigh what they are."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.coordinator.rules.assignment import lcg_shuffle
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.sample_order import MAX_DATASET_SIZE, micro_batches, sample_indices, shuffle_seed

seeds = st.integers(0, 2**64 - 1)


@pytest.mark.slow
@given(size=st.integers(1, 600), seed=seeds, number=st.integers(0, 2**30))
def test_a_pass_takes_every_sample_once(size: int, seed: int, number: int) -> None:
    samples = sample_indices(range(number * size, (number + 1) * size), size, seed)
    assert sorted(samples) == list(range(size))


@pytest.mark.slow
@given(size=st.integers(1, 50), seed=seeds, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_it_does_not_matter_who_asks_for_which_part(size: int, seed: int, cuts: list[int]) -> None:
    end = min(200, 8 * size)  # of small datasets not all too many passes: each takes its time
    edges = [0, *sorted(min(cut, end) for cut in cuts), end]
    parts = [sample_indices(range(a, b), size, seed) for a, b in pairwise(edges)]
    assert list(chain.from_iterable(parts)) == sample_indices(range(end), size, seed)


def test_members_come_and_go_and_every_sample_is_trained_once_per_pass() -> None:
    size, batch, passes = 97, 13, 5
    rng, trained, start = random.Random(0), [], 0
    while start < passes * size:
        members = list(range(rng.randint(1, 7)))
        lcg_shuffle(members, rng.getrandbits(64))
        edges = [start + batch * n // len(members) for n in range(len(members) + 1)]
        for first, last in rng.sample(list(pairwise(edges)), len(members)):
            trained += [(index // size, sample) for index, sample in enumerate_samples(first, last, size)]
        start += batch
    for number in range(passes):
        assert sorted(sample for n, sample in trained if n == number) == list(range(size))


def enumerate_samples(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return list(zip(range(first, last), sample_indices(range(first, last), size, seed=7), strict=True))


def test_every_pass_and_every_run_has_an_order_of_its_own() -> None:
    size = 64
    orders = {tuple(sample_indices(range(n * size, (n + 1) * size), size, 1)) for n in range(50)}
    orders |= {tuple(sample_indices(range(size), size, seed)) for seed in range(2, 52)}
    assert len(orders) == 100


@pytest.mark.slow
def test_places_and_samples_have_nothing_to_do_with_each_other() -> None:
    size, passes = 16, 4000
    counts = [[0] * size for _ in range(size)]
    for number in range(passes):
        for place, sample in enumerate(sample_indices(range(number * size, (number + 1) * size), size, 3)):
            counts[place][sample] += 1
    expected = passes / size
    chi_squared = sum((count - expected) ** 2 / expected for row in counts for count in row)
    assert chi_squared < 330  # 225 degrees of freedom; 330 is passed by chance once in 100 000 times


def test_the_order_stays_what_it_was_in_earlier_versions() -> None:
    assert sample_indices(range(12), 12, 0) == [1, 10, 9, 3, 5, 11, 2, 8, 7, 4, 0, 6]
    assert sample_indices(range(10**15, 10**15 + 4), 10**9 + 7, 2**64 - 1) == [
        962354994,
        281849727,
        633930062,
        403663166,
    ]
    assert shuffle_seed("my-run") == 15577332941934011643


def test_a_dataset_of_one_sample_and_the_largest_one() -> None:
    assert sample_indices(range(3), 1, 5) == [0, 0, 0]
    assert all(0 <= n < MAX_DATASET_SIZE for n in sample_indices(range(100), MAX_DATASET_SIZE, 5))


@pytest.mark.parametrize("size", [0, -1, MAX_DATASET_SIZE + 1])
def test_a_dataset_without_samples_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        sample_indices(range(1), size, 0)


@pytest.mark.slow
@given(count=st.integers(1, 200), size=st.integers(1, 17), world_size=st.integers(1, 5))
def test_pieces_of_all_devices_average_to_the_mean_of_the_share(count: int, size: int, world_size: int) -> None:
    values = [float(n * n) for n in range(count)]
    devices = [micro_batches(range(count), size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(pieces) for pieces in devices}) == 1
    assert all(1 <= len(piece.samples) <= size for pieces in devices for piece in pieces)
    counted = [s for pieces in devices for piece in pieces if piece.weight for s in piece.samples]
    assert sorted(counted) == list(range(count))
    total = sum(
        piece.weight * sum(values[s] for s in piece.samples) / len(piece.samples)
        for pieces in devices
        for piece in pieces
    )
    assert total / world_size == pytest.approx(sum(values) / count)
