"""Ours beside twins of Psyche's clients, by Psyche's rules: all results count, weights are equal, nobody is dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from typing_extensions import override

from distro_optim.comm import postcard
from distro_optim.compress import CompressedUpdate
from distro_optim.coordinator.messages import Join
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.types import BatchId, ClientState, Coordinator, RunState
from distro_optim.errors import InvalidResultError
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.strategy.rounds.broadcasts import Broadcast, Finished, TrainingResult
from distro_optim.strategy.rounds.results import encode_result, max_result_size, read_any_result, read_result
from distro_optim.strategy.rounds.rounds import Rounds, Stage
from distro_optim.testing.psyche_twin import PsycheTwin, with_wild_values
from distro_optim.testing.updates import random_update, same_update
from rounds.simulator import PLAN, Member, Weather, World

HARMLESS = {DropReason.DUPLICATE, DropReason.WRONG_STEP, DropReason.NOT_RUNNING}
DEAF_SECONDS = 10.0
"""A client of Psyche's notices only then that it has no neighbour."""


class Ours(Member):
    """One of ours, that sends signs or values."""

    quantized = True

    @override
    def tell(self, message: Any) -> None:
        """The server tells everybody at once when a phase has ended."""
        before = self.world.state.run_state
        super().tell(message)
        state = self.world.state
        if state.run_state is not before:
            for member in self.world.members:
                self.world.later(0.0, lambda member=member: member.see(state))  # type: ignore[misc]

    @override
    def gradient(self, action: act.TrainBatch) -> CompressedUpdate:
        seed = int.from_bytes(b"".join(self.trainer.digests())[:4], "big") ^ action.batch.start * 7919
        return random_update(PLAN, quantized=self.quantized, seed=seed)


class Theirs(Ours):
    """One of Psyche's. Of values, one tensor consists of NaN and infinities."""

    joins = 0
    lost: frozenset[int] = frozenset()
    """Steps whose result nobody hears of when it is announced for the first time."""

    @override
    def _new_rounds(self) -> Rounds:
        ours = super()._new_rounds()
        return cast(
            Rounds, PsycheTwin(identity=self.id, key=self.key, address=ours.address, draw=self.world.rng.randbytes)
        )

    @override
    def gradient(self, action: act.TrainBatch) -> CompressedUpdate:
        update = super().gradient(action)
        return update if self.quantized else with_wild_values(update, tensor=1)

    @override
    def tell(self, message: Any) -> None:
        self.joins += isinstance(message, Join)
        super().tell(message)

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.TrainBatch):  # it hashes nothing, so its weights are noted here
            self.hashes[action.step] = tuple(self.trainer.digests())
        if isinstance(action, act.Announce):
            said: Broadcast = postcard.decode(Broadcast, action.data)
            if said.step in self.lost and isinstance(said.data, TrainingResult):
                self.lost -= {said.step}
                return
        super().carry_out(action)


class PsychesWorld(World):
    checkpoint = Hub(HubRepo("somebody/model"))


@dataclass
class Mixed:
    """A run of ours and theirs."""

    world: World
    ours: list[Ours]
    theirs: list[Theirs]

    @classmethod
    def of(cls, ours: int, theirs: int, *, quantized: bool, **world: Any) -> Mixed:
        settings = {"total_steps": 24, "epoch_time": 60, "max_round_train_time": 15, "round_witness_time": 1}
        place = PsychesWorld(**{**settings, **world})
        made = cls(place, [], [])
        for number in range(1, ours + theirs + 1):
            kind = Ours if number <= ours else Theirs
            member = kind(place, number)
            member.quantized = quantized
            (made.ours if kind is Ours else made.theirs).append(member)  # type: ignore[arg-type]
        return made

    def until_finished(self) -> None:
        """Looks at every state that nobody is dropped."""

        def is_over(state: Coordinator) -> bool:
            clients = (*state.epoch_state.clients, *state.epoch_state.exited_clients)
            assert all(client.state is ClientState.HEALTHY for client in clients), state.progress
            return state.run_state is RunState.FINISHED

        self.world.until(is_over)
        self.world.step()

    @property
    def dropped(self) -> Counter[DropReason]:
        """By ours, of anybody."""
        return sum((member.rounds.dropped for member in self.ours), Counter())

    def assert_all_counted(self, *, every: int) -> None:
        """All had the same weights at each step, to which every batch contributed."""
        self.world.assert_equal_weights()
        for member in (*self.ours, *self.theirs):
            assert set(member.applied.values()) == {every}, member.applied
            assert not member.of(act.Desynced)
        # The one step of Psyche's machine that leads nowhere is the last.
        assert all("Finished" in member.of(act.RunEnded)[-1].error for member in self.theirs)
        assert all(member.of(act.RunEnded)[-1].error is None for member in self.ours)
        assert all(member.joins == 1 for member in self.theirs)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_every_result_counts_and_nobody_is_dropped(quantized: bool) -> None:
    run = Mixed.of(2, 2, quantized=quantized)
    run.until_finished()
    assert run.world.state.progress.epoch >= 1
    run.assert_all_counted(every=4)
    assert set(run.dropped) <= HARMLESS


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (3, 1), (1, 3)])
def test_whoever_is_in_the_majority(ours: int, theirs: int, quantized: bool) -> None:
    run = Mixed.of(ours, theirs, quantized=quantized, total_steps=12)
    run.until_finished()
    run.assert_all_counted(every=ours + theirs)
    assert set(run.dropped) <= HARMLESS


def test_in_a_run_of_theirs_they_hear_all_that_they_wait_for_and_no_result_goes_along() -> None:
    run = Mixed.of(2, 1, quantized=True, total_steps=8)
    run.until_finished()
    for member in run.ours:
        said = member.of(act.Announce)
        assert all(action.carrying is None for action in said)
        broadcasts = [postcard.decode(Broadcast, action.data) for action in said]
        assert {b.step for b in broadcasts if isinstance(b.data, Finished)} >= set(range(1, 6))


def test_a_result_that_nobody_heard_of_is_waited_for_until_it_is_repeated() -> None:
    """Which takes tens of seconds. Without it the client would be missed by two witnesses of three, and dropped."""
    run = Mixed.of(2, 1, quantized=True, total_steps=8, epoch_time=600, max_round_train_time=120)
    run.theirs[0].lost = frozenset({2, 4})
    run.until_finished()
    assert not run.theirs[0].lost
    assert run.world.now > 30
    run.assert_all_counted(every=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_late_and_lost_gossip_costs_time_and_no_client(seed: int) -> None:
    """What Psyche's clients say is repeated only after tens of seconds; ours wait for it as their own kind does."""
    weather = Weather(gossip_loss=0.15, delay=(0.05, 1.0))
    run = Mixed.of(
        2, 2, quantized=False, seed=seed, weather=weather, total_steps=14, epoch_time=600, max_round_train_time=120
    )
    run.until_finished()
    assert run.world.seen["lost messages"] > 20
    run.assert_all_counted(every=4)
    assert set(run.dropped) <= HARMLESS


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_in_fifty_four_rounds_at_most_ten_announcements_say_what_everybody_has(seconds: float) -> None:
    """As Psyche's client counts them: those that it ignores."""
    run = Mixed.of(1, 1, quantized=True, total_steps=57, epoch_time=900, max_round_train_time=60)
    for member in run.world.members:
        member.train_seconds = seconds
    run.until_finished()
    ignored = run.theirs[0].rounds.dropped
    assert ignored[DropReason.DUPLICATE] + ignored[DropReason.WRONG_STEP] <= 10
    run.assert_all_counted(every=2)


def test_a_client_that_loads_long_hears_soon_that_we_are_ready() -> None:
    """It hears nothing before, and would wait ten seconds for the next repetition."""
    run = Mixed.of(2, 1, quantized=True, warmup_time=50, epoch_time=90)
    run.theirs[0].load_seconds = 4.0
    began = run.world.until_phase(RunState.WARMUP).run_state_start_unix_timestamp
    run.world.until_phase(RunState.ROUND_TRAIN)
    assert run.world.now - began < 4.0 + 3.0


def test_clients_that_hear_nothing_at_first_are_waited_for() -> None:
    run = Mixed.of(2, 2, quantized=True, total_steps=8, warmup_time=50, epoch_time=90)
    run.world.until_phase(RunState.WARMUP)
    run.world.cut_off.update(run.theirs)
    run.world.later(DEAF_SECONDS, run.world.cut_off.clear)
    run.until_finished()
    assert run.world.seen["lost messages"]
    run.assert_all_counted(every=4)


def test_a_client_without_consensus_reports_itself_and_stays_outside() -> None:
    """Not to be copied: this is what happens to it where its peers do not count what it sends."""
    run = Mixed.of(2, 1, quantized=True, total_steps=30)
    (lonely,) = run.theirs
    run.world.until_phase(RunState.ROUND_TRAIN, height=1)
    run.world.cut_off.add(lonely)
    run.world.until(
        lambda state: any(
            client.id == lonely.id and client.state is ClientState.DROPPED for client in state.epoch_state.clients
        )
    )
    own = [check for checks in lonely.of(act.SendHealthChecks) for check in checks.checks]
    assert lonely.id in [client for client, _ in own]
    run.world.cut_off.clear()
    run.world.until(lambda state: state.progress.epoch >= 1 and state.run_state is RunState.ROUND_TRAIN)
    assert lonely.joins == 1
    assert lonely.id not in [client.id for client in run.world.state.epoch_state.clients]
    assert lonely.rounds.stage is Stage.RUNNING


# -- values that are no numbers ----------------------------------------------------------------------------------------


def wild_result() -> tuple[CompressedUpdate, dict[str, Any]]:
    update = with_wild_values(random_update(PLAN, quantized=False, seed=3), tensor=1)
    batch = BatchId(4, 7)
    blob, data_hash = encode_result(update, step=5, trainer_nonce=1, batch=batch)
    return update, {"data": blob, "step": 5, "batch": batch, "data_hash": data_hash, "plan": PLAN}


@pytest.mark.parametrize("read", [read_result, read_any_result])
def test_wild_values_are_read_bit_for_bit_where_they_are_allowed_and_refused_elsewhere(read: Any) -> None:
    update, announced = wild_result()
    taken = read(**announced, finite=False).update
    assert not all(value.isfinite().all() for value in taken.value)
    for ours, theirs in zip(taken.value, update.value, strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    with pytest.raises(InvalidResultError, match="not finite"):
        read(**announced)
    honest = random_update(PLAN, quantized=False, seed=3)
    blob, data_hash = encode_result(honest, step=5, trainer_nonce=1, batch=announced["batch"])
    assert same_update(read(**{**announced, "data": blob, "data_hash": data_hash}, finite=False).update, honest)


def test_a_run_of_our_own_kind_does_not_take_them() -> None:
    """One NaN would cancel what everybody else contributes to its tile."""
    world = World(total_steps=12, epoch_time=60)
    honest = [Ours(world, number) for number in (1, 2, 3)]
    for member in honest:
        member.quantized = False
    wild = honest[2]
    wild.gradient = lambda action: with_wild_values(Ours.gradient(wild, action))  # type: ignore[method-assign]
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    assert wild.rounds.dropped[DropReason.INVALID_RESULT]  # it reads what it sends, and sends nothing
    assert set(honest[0].applied.values()) == {2}


def test_values_in_float32_from_a_client_that_shards_its_model_fit() -> None:
    """It has its model in the precision of the file, and its peers in bfloat16."""
    narrow = replace_dtype(torch.bfloat16)
    wide = replace_dtype(torch.float32)
    update = random_update(wide, quantized=False, seed=1)
    batch = BatchId(0, 1)
    blob, data_hash = encode_result(update, step=2, trainer_nonce=0, batch=batch)
    assert len(blob) <= max_result_size(narrow)
    taken = read_result(blob, step=2, batch=batch, data_hash=data_hash, plan=narrow).update
    assert {value.dtype for value in taken.value} == {torch.bfloat16}


def replace_dtype(dtype: torch.dtype) -> Any:
    from distro_optim.compress import make_plan

    return make_plan([replace(spec, dtype=dtype, shape=(64, 64)) for spec in PLAN.specs], "divisor")
