"""One liar among five, each with another lie, through two epochs: the honest notice, and stay equal."""

from __future__ import annotations

import pytest

from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.strategy.rounds.rounds import Stage
from rounds import liars
from rounds.liars import Liar, Lie
from rounds.simulator import Member, Weather, World


def run_with(lie: Lie, *, seed: int = 1, weather: Weather | None = None, steps: int = 20) -> tuple[World, Liar]:
    world = World(
        seed=seed, weather=weather, total_steps=steps, epoch_time=70, max_round_train_time=8, witness_nodes=0,
        cold_start=3,
    )  # fmt: skip
    for number in range(1, 5):
        Member(world, number)
    liar = Liar(world, 5, lie)
    world.until_finished()
    assert liar.lies
    return world, liar


def assert_honest_are_equal(world: World, liar: Liar) -> list[Member]:
    honest = [member for member in world.members if member is not liar]
    world.members = honest
    world.assert_equal_weights()
    for member in honest:
        assert member.rounds.stage is Stage.ENDED
        assert member.of(act.RunEnded)[-1].error is None
        assert not member.of(act.Desynced)
    return honest


def assert_dropped(members: list[Member], liar: Liar, reason: DropReason) -> None:
    for member in members:
        assert any(drop.reason is reason and drop.sender == liar.key.public for drop in member.of(act.Dropped))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (liars.another_blob_than_committed, DropReason.WRONG_HASH),
        (liars.garbage, DropReason.WRONG_HASH),
        (liars.the_result_of_an_earlier_round, DropReason.WRONG_HASH),
        (liars.another_shape, DropReason.INVALID_RESULT),
        (liars.too_few_tensors, DropReason.INVALID_RESULT),
        (liars.more_coefficients, DropReason.INVALID_RESULT),
        (liars.not_a_number, DropReason.INVALID_RESULT),
        (liars.an_index_twice, DropReason.INVALID_RESULT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_honest_drop_the_lie_with_its_reason_and_stay_equal(lie: Lie, reason: DropReason) -> None:
    world, liar = run_with(lie)
    assert_dropped(assert_honest_are_equal(world, liar), liar, reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lie", [liars.nothing_to_fetch, liars.far_too_large, liars.two_results, liars.one_commitment_for_two_blobs]
)
def test_the_honest_stay_equal_whatever_else_is_announced(lie: Lie) -> None:
    world, liar = run_with(lie)
    assert_honest_are_equal(world, liar)


@pytest.mark.slow
@pytest.mark.parametrize("lie", [liars.another_shape, liars.nothing_to_fetch, liars.garbage])
def test_who_brings_nothing_of_use_is_taken_off_the_list(lie: Lie) -> None:
    world, liar = run_with(lie)
    assert any(action.checks for member in world.members for action in member.of(act.SendHealthChecks))
    assert liar.of(act.Rejoin)


STORM = Weather(gossip_loss=0.1, delay=(0.05, 1.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "weather", "seed"),
    [(4, None, 1), (4, None, 2), (8, STORM, 1), (8, STORM, 2), (20, None, 1)],
)
def test_of_a_flood_of_different_results_none_is_praised_and_the_honest_stay_equal(
    count: int, weather: Weather | None, seed: int
) -> None:
    world, liar = run_with(liars.different_results(count), seed=seed, weather=weather)
    assert_dropped(assert_honest_are_equal(world, liar), liar, DropReason.TOO_MANY)
    assert liar.of(act.Rejoin), "it was not taken off the list"


@pytest.mark.slow
def test_a_result_that_a_quorum_has_seen_is_fetched_also_by_one_who_was_kept_busy_with_others() -> None:
    world = World(total_steps=14, epoch_time=70, max_round_train_time=8)
    members = [Member(world, number) for number in range(1, 5)]
    liar = liars.OneToMostAndFiveToOne(world, 5)
    world.until_finished()
    assert liar.lies
    assert_dropped(members[:1], liar, DropReason.TOO_MANY)
    assert 5 in members[0].applied.values(), "it never counted"
    assert_honest_are_equal(world, liar)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_who_tells_each_half_another_result_is_found_out_by_the_weights(seed: int) -> None:
    world = World(seed=seed, total_steps=20, epoch_time=70, max_round_train_time=8)
    for number in range(1, 5):
        Member(world, number)
    liar = Liar(world, 5, liars.two_results)
    liar.splits = True
    world.until_finished()
    assert liar.lies
    world.members.remove(liar)
    world.assert_every_difference_was_noticed()
    world.assert_healed()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [liars.LyingWitness, liars.LyingReporter])
def test_one_who_lies_about_what_it_saw_or_has_changes_nothing(kind: type[Member]) -> None:
    world = World(total_steps=20, epoch_time=70, max_round_train_time=8)
    members = [Member(world, number) for number in range(1, 5)]
    kind(world, 5)
    world.until_finished()
    for member in members:
        assert not member.of(act.Desynced)
    world.members = members
    world.assert_equal_weights()
