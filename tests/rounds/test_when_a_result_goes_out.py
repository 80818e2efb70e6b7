"""A result is wanted two rounds later: it must not be on the line before the reports that end its own round."""

from __future__ import annotations

from typing import Any

import pytest
from typing_extensions import override

from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.own_result import MAX_HOLD_SECONDS
from rounds.simulator import TICK, Member, World

QUICK, SLOW = 1.0, 6.0


class Watched(Member):
    """Notes when it did what; may take its time to encode a result."""

    encode_seconds = 0.0

    @override
    def carry_out(self, action: act.Action) -> None:
        if not hasattr(self, "times"):
            self.times: list[tuple[float, act.Action]] = []
        self.times.append((self.world.now, action))
        if isinstance(action, act.PublishResult) and self.encode_seconds:
            self.later(self.encode_seconds, lambda: self.rounds.publish(self.world.now))
        else:
            super().carry_out(action)

    def when(self, kind: type[Any]) -> dict[int, float]:
        """The first time of each step."""
        found: dict[int, float] = {}
        for now, action in self.times:
            if isinstance(action, kind):
                step = int(action.tag.rpartition("_")[2]) if isinstance(action, act.StoreBlob) else action.step
                found.setdefault(step, now)
        return found


def run(train_seconds: list[float], *, encode_seconds: float = 0.0, **config: Any) -> tuple[World, list[Watched]]:
    world = World(total_steps=12, epoch_time=3600, **config)
    members = [Watched(world, number, train_seconds=s) for number, s in enumerate(train_seconds, 1)]
    for member in members:
        member.encode_seconds = encode_seconds
    world.until_finished()
    world.assert_equal_weights()
    return world, members


def assert_nothing_was_lost(members: list[Watched]) -> None:
    for member in members:
        assert not member.of(act.Desynced)
        assert not member.of(act.ResultMissing)
        applied = member.of(act.ApplyResults)
        assert len(applied) > 5
        assert all(len(action.updates) == len(members) for action in applied)
        batches = member.of(act.TrainBatch)
        assert [batch.own_previous for batch in batches[1:]] == [("own", batch.step - 1) for batch in batches[1:]]


@pytest.mark.slow
def test_it_waits_until_the_round_is_over() -> None:
    _, members = run([QUICK, QUICK, QUICK], round_witness_time=0)
    for member in members:
        reported, published, trained = (member.when(kind) for kind in (act.SendWitness, act.StoreBlob, act.TrainBatch))
        assert all(reported[step] <= published[step] for step in published)
        for step in published.keys() & {step - 1 for step in trained}:
            assert published[step] <= trained[step + 1]
        order = [action for _, action in member.times if isinstance(action, act.StoreBlob | act.TrainBatch)]
        kinds = [type(action) for action in order]
        assert kinds == [act.TrainBatch, act.StoreBlob] * (len(kinds) // 2)
    assert_nothing_was_lost(members)


@pytest.mark.slow
def test_it_does_not_wait_for_a_slow_peer() -> None:
    _, (quick, *others) = run([QUICK, SLOW, SLOW], round_witness_time=0)
    asked, published = quick.when(act.PublishResult), quick.when(act.StoreBlob)
    assert len(published) > 5
    for step in published:
        assert published[step] - asked[step] <= MAX_HOLD_SECONDS + TICK
    assert_nothing_was_lost([quick, *others])


@pytest.mark.slow
def test_in_a_run_of_psyche_it_goes_out_at_once() -> None:
    _, members = run([QUICK, QUICK, QUICK])
    for member in members:
        asked, published = member.when(act.PublishResult), member.when(act.StoreBlob)
        assert len(published) > 5
        assert {step: asked[step] for step in published} == published


@pytest.mark.slow
@pytest.mark.parametrize("peers", [1, 3])
@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_a_round_goes_on_while_its_result_is_still_being_encoded(seconds: float, peers: int) -> None:
    least = {"init_min_clients": peers, "min_clients": peers}
    _, members = run([QUICK] * peers, encode_seconds=seconds, round_witness_time=0, **least)
    assert_nothing_was_lost(members)
    late = 0
    for member in members:
        published, trained = member.when(act.StoreBlob), member.when(act.TrainBatch)
        late += sum(published[step] > trained[step + 1] for step in published if step + 1 in trained)
    assert late > 0 or seconds < 1
