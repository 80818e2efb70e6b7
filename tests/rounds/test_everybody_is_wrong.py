"""All members find their weights to be wrong at once: nobody shares any, and the run must go on nevertheless."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from typing_extensions import override

from distro_optim.coordinator.model import P2P
from distro_optim.coordinator.types import Committee, CommitteeProof, MerkleRoot, RunState
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.broadcasts import Finished
from distro_optim.verify.commitment import finished_hash
from distro_optim.verify.merkle import EMPTY_ROOT
from rounds.simulator import Member, Trainer, World, run_of

SETTINGS: dict[str, Any] = {
    "total_steps": 36,  # all have other weights by step 12
    "epoch_time": 30,
    "max_round_train_time": 8,
    "warmup_time": 30,
    "min_clients": 1,
}


class Troubled(World):
    """Each misses the result that another makes in one step, and perhaps what the others say of their weights."""

    missed_step = -1
    misses_reports = False

    @override
    def fetch(self, who: Member, action: act.FetchBlob) -> None:
        neighbour = self.members[(self.members.index(who) + 1) % len(self.members)]
        if action.ticket.hash in neighbour.stored.get(self.missed_step, ()):
            who.later(0.1, lambda: who.rounds.fetch_failed(action.ticket.hash, self.now))
        else:
            super().fetch(who, action)

    @override
    def gossip(self, sender: Member, data: bytes, *, weights: bool, to: Collection[Member] | None = None) -> None:
        if not (weights and self.misses_reports):
            super().gossip(sender, data, weights=weights, to=to)


def troubled(count: int, **settings: Any) -> tuple[Troubled, list[Member]]:
    world = Troubled(**SETTINGS | settings)
    return world, [Member(world, number) for number in range(1, count + 1)]


def until_all_are_at_fault(world: Troubled) -> int:
    """The step at which nobody believes in its weights any more."""
    world.missed_step = world.until_phase(RunState.ROUND_TRAIN, height=4).progress.step
    world.misses_reports = True
    world.until_phase(RunState.COOLDOWN)  # before those that waited in vain, and trained nothing, are dropped for it
    world.misses_reports = False
    assert all(member.of(act.Desynced) for member in world.members)
    assert len({tuple(member.trainer.digests()) for member in world.members}) > 1
    world.until_phase(RunState.WARMUP, epoch=1)
    assert isinstance(world.state.model.checkpoint, P2P)
    return world.state.progress.step


def assert_went_on(world: World, members: list[Member], step: int, giver: Member) -> None:
    """All have trained on, with the weights of ``giver``."""
    begun = world.state.epoch_state.start_step
    assert begun >= step
    (given,) = {member.hashes[begun] for member in members}
    assert given != tuple(Trainer().digests()), "the run began from the start"
    world.until_finished()
    for member in members:
        assert member.rounds.fault is None
        assert any(batch.step > begun + 4 for batch in member.of(act.TrainBatch))
    last = max(giver.hashes)
    assert len({member.hashes[last] for member in members}) == 1
    (own,) = [a for a in giver.of(act.Initialize) if a.step == begun and not a.providers]
    assert own
    for member in members:
        if member is not giver:
            loads = [a for a in member.of(act.Initialize) if a.step == begun]
            assert all(a.providers for a in loads)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_first_of_the_list_gives_its_weights_and_the_others_take_them(count: int) -> None:
    world, members = troubled(count)
    step = until_all_are_at_fault(world)
    world.until(lambda s: s.run_state is RunState.ROUND_TRAIN and all(m.in_step for m in members), steps=2000)
    assert [client.id for client in world.state.epoch_state.clients] == [member.id for member in members]
    assert_went_on(world, members, step, members[0])


@pytest.mark.slow
def test_where_all_have_other_weights_and_say_so_those_of_the_first_count() -> None:
    world, members = troubled(4)
    world.missed_step = world.until_phase(RunState.ROUND_TRAIN, height=4).progress.step
    world.until(lambda _: all(member.of(act.Desynced) for member in members[1:]), steps=200)
    world.until_finished()
    assert not members[0].of(act.Desynced)
    assert all(member.rounds.fault is None for member in members)
    last = max(members[0].hashes)
    assert len({member.hashes[last] for member in members}) == 1


@pytest.mark.slow
def test_the_second_does_where_the_first_is_gone_without_a_word() -> None:
    world, members = troubled(3)
    step = until_all_are_at_fault(world)
    members[0].alive = False  # the coordinator does not know
    others = members[1:]
    world.until(lambda s: s.run_state is RunState.ROUND_TRAIN and all(m.in_step for m in others), steps=3000)
    assert_went_on(world, others, step, members[1])


class SaysItIsReady(Member):
    """Says in every warm-up that it has the weights, and gives them to nobody."""

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.Initialize) and self.world.state.progress.epoch > 0:
            rounds = self.rounds
            rounds._peers.allow(client.id for client in self.world.state.epoch_state.clients)
            proof = CommitteeProof(Committee.TIE_BREAKER, 0, 0)
            ready = Finished(MerkleRoot(), warmup=True)
            rounds._announcer.say(0, proof, finished_hash(EMPTY_ROOT), ready, self.world.now)
            self.later(0.0, rounds._outbox.take)
            return
        super().carry_out(action)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 3])
def test_one_that_says_it_is_ready_and_gives_nothing_holds_nobody_up_for_long(place: int) -> None:
    world = Troubled(**SETTINGS | {"total_steps": 50})
    members: list[Member] = [
        SaysItIsReady(world, number) if number == place + 1 else Member(world, number) for number in range(1, 5)
    ]
    honest = [member for member in members if not isinstance(member, SaysItIsReady)]
    step = until_all_are_at_fault(world)
    world.until(lambda s: s.run_state is RunState.ROUND_TRAIN and all(m.in_step for m in honest), steps=4000)
    assert any(m.rounds._phases.warm_up._ready for m in honest)
    assert_went_on(world, honest, step, honest[0])


@pytest.mark.slow
def test_one_that_is_left_alone_with_wrong_weights_does_not_let_the_run_go_by_untrained() -> None:
    world, members = run_of(2, **SETTINGS | {"total_steps": 80, "epoch_time": 10_000, "init_min_clients": 1})
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    for tensor in members[1].trainer.weights:
        tensor.view(-1)[0] += 1.0
    world.until(lambda _: bool(members[1].of(act.Desynced)))
    members[0].crash()
    left_at = world.state.progress.step
    world.until_finished()
    trained = {batch.step for batch in members[1].of(act.TrainBatch)}
    assert len(trained.intersection(range(left_at, 80))) > 80 - left_at - 10


@pytest.mark.slow
def test_who_is_cut_off_alone_gives_nothing_and_takes_what_the_others_have() -> None:
    world, members = run_of(3, **SETTINGS | {"total_steps": 50})
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    world.cut_off.add(members[0])
    world.until(lambda _: bool(members[0].of(act.Desynced)), steps=200)
    world.until_phase(RunState.WARMUP, epoch=1)
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=2)
    world.cut_off.clear()
    world.until(lambda s: s.progress.epoch >= 2 and all(m.in_step for m in members), steps=2000)
    world.until_finished()
    assert all(member.rounds.fault is None for member in members)
    last = max(members[1].hashes)
    assert len({member.hashes[last] for member in members}) == 1
    assert not members[1].of(act.Desynced)
    assert not members[2].of(act.Desynced)
