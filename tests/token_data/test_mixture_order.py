"""Which sample of which member a mixture gives where: the proportions, the order, and Psyche's own examples."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.coordinator.model import DontShuffle, Seeded
from distro_optim.coordinator.types import BatchId
from distro_optim.data.mixture_index import MixtureIndex, normalized_weights
from distro_optim.data.shuffle import ChaCha8, index_shuffle
from distro_optim.errors import ConfigurationError, DataUnavailableError

SEED = bytes(range(1, 33))


def order(index: MixtureIndex) -> list[tuple[int, int]]:
    return [index.locate(place) for place in range(len(index))]


def plain_order(sizes: list[int], weights: list[float]) -> list[tuple[int, int]]:
    """The rule as Psyche has it written down, without anything clever."""
    total = 0.0
    for weight in weights:
        total += weight
    shares = [weight / total for weight in weights]
    drawn, unique, found = [0] * len(sizes), [0] * len(sizes), []
    for place in range(sum(sizes)):
        errors = [
            share * max(float(place), 1.0) - count if size else float("-inf")
            for share, count, size in zip(shares, drawn, sizes, strict=True)
        ]
        chosen = errors.index(max(errors))
        if unique[chosen] < sizes[chosen]:
            sample, unique[chosen] = unique[chosen], unique[chosen] + 1
        else:
            sample = drawn[chosen] % sizes[chosen]
        found.append((chosen, sample))
        drawn[chosen] += 1
    return found


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1e6)), min_size=1, max_size=5).filter(
        lambda members: any(size for size, _ in members) and sum(weight for _, weight in members) > 0
    )
)
def test_a_mixture_follows_the_plain_rule(members: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in members], [weight for _, weight in members]
    assert order(MixtureIndex(sizes, weights, DontShuffle())) == plain_order(sizes, weights)


def test_two_members_of_one_weight_take_turns() -> None:
    # Psyche's test of a mixture behind HTTP: two members of four samples.
    assert order(MixtureIndex([4, 4], [1.0, 1.0], DontShuffle())) == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3),
    ]  # fmt: skip


def test_a_small_member_is_seen_whole_before_it_repeats() -> None:
    # Psyche's example: weights of a half, 5 and 20 samples.
    places = order(MixtureIndex([5, 20], [0.5, 0.5], DontShuffle()))
    first = [sample for member, sample in places if member == 0]
    second = [sample for member, sample in places if member == 1]
    assert len(first) in (12, 13)
    assert first == [place % 5 for place in range(len(first))]
    assert second == list(range(len(second)))


@pytest.mark.parametrize("shares", [(14, 4, 1), (1, 1), (0.7, 0.3), (5, 0, 1)])
def test_every_prefix_has_the_proportions_of_the_weights(shares: tuple[float, ...]) -> None:
    counts: Counter[int] = Counter()
    index = MixtureIndex([1000] * len(shares), shares, DontShuffle())
    for place in range(1000):
        counts[index.locate(place)[0]] += 1
        for member, share in enumerate(shares):
            assert abs(counts[member] - share / sum(shares) * (place + 1)) < len(shares)


def test_without_weights_the_members_lengths_count() -> None:
    places = order(MixtureIndex([100, 300], None, DontShuffle()))
    counts = Counter(member for member, _ in places[:100])
    assert counts == {0: 25, 1: 75}


def test_a_shuffled_mixture_is_the_plain_one_with_its_places_shuffled() -> None:
    plain = order(MixtureIndex([5, 20, 7], [1, 2, 3], DontShuffle()))
    places = list(range(len(plain)))
    index_shuffle([places], ChaCha8(SEED))
    assert order(MixtureIndex([5, 20, 7], [1, 2, 3], Seeded(SEED))) == [plain[place] for place in places]


def test_places_are_shuffled_as_by_rand() -> None:
    places = list(range(10))
    index_shuffle([places], ChaCha8(SEED))
    assert places == [7, 8, 1, 4, 3, 9, 2, 5, 0, 6]


def test_beyond_the_end_is_the_first_sample_of_the_first_member() -> None:
    index = MixtureIndex([4, 4], None, Seeded(SEED))
    assert index.locate(8) == index.locate(2**64 - 1) == (0, 0)


def test_the_order_is_the_same_wherever_it_is_asked_for_first() -> None:
    forward, backward = (MixtureIndex([100_000, 70_000], [3, 1], DontShuffle()) for _ in range(2))
    late = [backward.locate(place) for place in range(169_999, 169_900, -1)]
    assert late == [forward.locate(place) for place in range(169_999, 169_900, -1)]
    assert [forward.locate(place) for place in range(100)] == [backward.locate(place) for place in range(100)]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 20), st.sampled_from([DontShuffle(), Seeded(SEED)]))
def test_requests_to_members_cover_a_batch_once(start: int, length: int, shuffle: DontShuffle | Seeded) -> None:
    index = MixtureIndex([5, 20, 7], [3, 1, 1], shuffle)
    batch = BatchId(start, start + length)
    found = {}
    for request in index.requests(batch):
        samples = range(request.batch.start, request.batch.end + 1)
        for sample, position in zip(samples, request.positions, strict=True):
            assert position not in found
            found[position] = (request.member, sample)
    assert [found[position] for position in range(len(batch))] == [
        index.locate(place) for place in range(start, start + length + 1)
    ]


def test_neighbours_in_a_member_are_asked_for_at_once() -> None:
    requests = MixtureIndex([100, 100], [1, 1], DontShuffle()).requests(BatchId(20, 39))
    assert [(request.member, request.batch) for request in requests] == [(0, BatchId(10, 19)), (1, BatchId(10, 19))]


def test_weights_are_summed_from_left_to_right() -> None:
    # Summed exactly these give 1, as from Python 3.12 on; Rust's sum and a loop lose the last bit.
    weights = [0.1] * 10
    total = 0.0
    for weight in weights:
        total += weight
    assert total != 1.0
    assert normalized_weights(weights) == [0.1 / total] * 10


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0], [1.0]])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigurationError, match="weight"):
        MixtureIndex([1, 1], weights, DontShuffle())


def test_members_without_a_sample_make_no_mixture() -> None:
    with pytest.raises(ConfigurationError, match="no member"):
        MixtureIndex([0, 0], [1, 1], DontShuffle())


def test_members_that_lie_about_their_sizes_cost_nothing() -> None:
    index = MixtureIndex([2**60, 2**60], [1, 1], DontShuffle())
    with pytest.raises(DataUnavailableError, match="beyond"):
        index.locate(2**59)
    with pytest.raises(ConfigurationError, match="too large to shuffle"):
        MixtureIndex([2**60, 2**60], [1, 1], Seeded(SEED))
