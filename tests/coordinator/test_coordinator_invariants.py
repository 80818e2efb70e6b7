"""What stays true of a run whatever its clients, its clock and its strangers do, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distro_optim.comm import postcard
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.rules.assignment import assign_data, round_batch_size
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.rules.consensus import is_healthy
from distro_optim.coordinator.rules.machine import TickResult
from distro_optim.coordinator.rules.steps import DRAIN_ROUNDS
from distro_optim.coordinator.rules.transitions import LEADS_TO, is_halted
from distro_optim.coordinator.types import MAX_NUM_WITNESSES, ClientState, Coordinator, RunState
from distro_optim.errors import CoordinatorError
from runs import client, elected, ready, report, waiting_run

NUMBERS = st.integers(0, 11)
SEEDS = st.integers(0, 2**64 - 1)
# What one tick can go through: a warm-up that times out with too few clients trains for no time.
THROUGH_TRAINING = {(RunState.WARMUP, RunState.WAITING_FOR_MEMBERS), (RunState.WARMUP, RunState.FINISHED)}


@contextmanager
def refusal_of(*names: str) -> Iterator[None]:
    """Lets the named refusals pass, and no other."""
    try:
        yield
    except CoordinatorError as error:
        if error.code.value not in names:
            raise


class Run(RuleBasedStateMachine):
    """A run, its pending clients, and what it trained in the present epoch."""

    @initialize(
        witness_nodes=st.integers(0, 3),
        batches=st.tuples(st.integers(1, 40), st.integers(0, 40)),
        ramp=st.integers(0, 20_000),
        total_steps=st.sampled_from([6, 25, 1000]),
        epoch_time=st.integers(16, 120),
    )
    def start(self, witness_nodes: int, batches: tuple[int, int], ramp: int, total_steps: int, epoch_time: int) -> None:
        self.state = waiting_run(
            checkpoint=Hub(HubRepo("a/b")),
            cold_start_warmup_steps=2,
            witness_nodes=witness_nodes,
            min_clients=3,
            init_min_clients=3,
            global_batch_size_start=batches[0],
            global_batch_size_end=sum(batches),
            global_batch_size_warmup_tokens=ramp,
            total_steps=total_steps,
            epoch_time=epoch_time,
        )
        self.now = 1_000_000
        self.pending = dict.fromkeys(client(number) for number in range(4))
        self.rounds: list[tuple[int, int, bool]] = []  # of the epoch: first index, size, whether it trains
        self.epoch_started_at = 0

    def become(self, state: Coordinator) -> None:
        """Takes a new state over and checks the step to it."""
        old, new = self.state, state
        if old.run_state is not new.run_state:
            step = (old.run_state, new.run_state)
            assert new.run_state in LEADS_TO[old.run_state] or step in THROUGH_TRAINING
            if new.run_state is RunState.ROUND_TRAIN:
                self.note_round(old, new)
        assert new.progress.step - old.progress.step in (0, 1)
        assert new.progress.epoch - old.progress.epoch in (0, 1)
        assert new.progress.epoch_start_data_index >= old.progress.epoch_start_data_index
        self.state = new

    def note_round(self, old: Coordinator, new: Coordinator) -> None:
        round_ = new.current_round
        if new.epoch_state.first_round:
            assert (round_.height, new.epoch_state.rounds_head) == (0, 0)
            self.rounds = []
            self.epoch_started_at = new.progress.epoch_start_data_index
        else:
            assert round_.height == old.current_round.height + 1
            assert new.epoch_state.rounds_head == (old.epoch_state.rounds_head + 1) % 4
        assert round_.clients_len == len(new.epoch_state.clients)
        assert round_.witnesses == ()
        self.rounds.append((round_.data_index, round_batch_size(new, round_), not new.epoch_state.last_step))

    @rule(seconds=st.sampled_from([0, 1, 3, 5, 15, 40]), seed=SEEDS)
    def time_passes(self, seconds: int, seed: int) -> None:
        self.now += seconds
        if is_halted(self.state):
            return  # the run is finished
        state, result = machine.tick(self.state, list(self.pending), self.now, seed)
        self.become(state)
        if result is TickResult.EPOCH_END:
            self.check_epoch()
            if state.run_state is RunState.PAUSED:
                self.become(machine.resume(state, self.now))
        self.leave_for(state)

    def leave_for(self, state: Coordinator) -> None:
        """As a server does: who was thrown out is not pending any more."""
        for exited in state.epoch_state.exited_clients:
            self.pending.pop(exited.id, None)

    def check_epoch(self) -> None:
        """All data from the epoch's start to the next one's belong to a round, and at most two rounds are skipped."""
        expected = self.epoch_started_at
        for index, size, _ in self.rounds:
            assert index == expected
            expected += size
        assert self.state.progress.epoch_start_data_index == expected
        trains = [train for *_, train in self.rounds]
        skipped = trains.count(False)
        assert skipped <= DRAIN_ROUNDS
        assert all(trains[: len(trains) - skipped])

    @rule(seconds=st.sampled_from([-3600, 3600]), seed=SEEDS)
    def the_clock_jumps_for_a_moment(self, seconds: int, seed: int) -> None:
        self.time_passes(seconds, seed)
        self.now -= seconds

    @rule(rounds=st.integers(1, 12), blind_to=NUMBERS, seed=SEEDS)
    def all_goes_well_for_some_rounds(self, rounds: int, blind_to: int, seed: int) -> None:
        if self.state.run_state is RunState.COOLDOWN:
            self.time_passes(5, seed)
        if self.state.run_state is RunState.WAITING_FOR_MEMBERS:
            for number in range(4):
                self.a_client_joins(number)
            self.time_passes(3, seed)
        self.clients_are_ready(12, seed)
        for _ in range(rounds):
            if self.state.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS):
                self.witnesses_report(12, blind_to)
                self.time_passes(3, seed)

    @rule(number=NUMBERS)
    def a_client_joins(self, number: int) -> None:
        self.pending[client(number)] = None

    @rule(number=NUMBERS)
    def a_client_disconnects(self, number: int) -> None:
        self.pending.pop(client(number), None)
        listed = [c.id for c in self.state.epoch_state.clients]
        if client(number) in listed:
            try:
                self.become(machine.withdraw(self.state, listed.index(client(number))))
            except CoordinatorError:
                assert self.state.epoch_state.clients[listed.index(client(number))].state is not ClientState.HEALTHY

    @rule(count=st.integers(1, 12), seed=SEEDS)
    def clients_are_ready(self, count: int, seed: int) -> None:
        for index, listed in enumerate(self.state.epoch_state.clients[:count]):
            if self.state.run_state in (RunState.WARMUP, RunState.ROUND_TRAIN):
                with refusal_of("DuplicateWitness"):
                    self.become(machine.warmup_witness(self.state, listed.id, ready(index), self.now, seed))

    @precondition(lambda self: self.state.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS))
    @rule(count=st.integers(1, 12), blind_to=NUMBERS)
    def witnesses_report(self, count: int, blind_to: int) -> None:
        seen = [c.id for c in self.state.epoch_state.clients if c.id != client(blind_to)]
        for sender, proof in elected(self.state)[:count]:
            with refusal_of("DuplicateWitness"):
                self.become(machine.witness(self.state, sender, report(proof, seen), self.now))

    @precondition(lambda self: not is_halted(self.state) and self.state.current_round.height >= 2)
    @rule()
    def the_idle_are_reported(self) -> None:
        previous = CommitteeSelection.for_round(self.state, self.state.previous_round)
        for index, listed in enumerate(self.state.epoch_state.clients):
            proof = previous.get_committee(index)
            with refusal_of("NoActiveRound", "InvalidCommitteeProof"):
                if not is_healthy(self.state, listed.id, proof):
                    state, dropped = machine.health_check(self.state, [(listed.id, proof)])
                    assert dropped == (listed.state is ClientState.HEALTHY)
                    self.become(state)

    @rule(number=NUMBERS, index=st.integers(0, 300), position=st.integers(0, 2**64 - 1), seed=SEEDS)
    def a_stranger_lies(self, number: int, index: int, position: int, seed: int) -> None:
        sender, lie = client(number + 100), ready(index)
        lie = replace(lie, proof=replace(lie.proof, position=position, witness=True))
        attempts: list[Callable[[], Coordinator]] = [
            lambda: machine.witness(self.state, sender, lie, self.now),
            lambda: machine.warmup_witness(self.state, sender, lie, self.now, seed),
            lambda: machine.checkpoint(self.state, sender, index, Hub(HubRepo("evil/model"))),
        ]
        for attempt in attempts:
            try:
                assert attempt() == self.state
            except CoordinatorError:
                pass

    @precondition(lambda self: self.state.run_state in (RunState.WARMUP, RunState.ROUND_TRAIN, RunState.COOLDOWN))
    @rule()
    def the_host_pauses(self) -> None:
        self.become(machine.pause(self.state, self.now))
        if self.state.run_state is RunState.PAUSED:
            self.now += 1
            self.become(machine.resume(self.state, self.now))

    @invariant()
    def nobody_is_listed_twice(self) -> None:
        epoch = self.state.epoch_state
        listed = [c.id for c in epoch.clients] + [c.id for c in epoch.exited_clients]
        assert len(set(listed)) == len(listed)
        assert all(c.state is not ClientState.HEALTHY for c in epoch.exited_clients)

    @invariant()
    def reports_are_bounded_and_distinct(self) -> None:
        indices = [w.proof.index for w in self.state.current_round.witnesses]
        assert len(indices) <= MAX_NUM_WITNESSES
        if self.state.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS):
            assert len(set(indices)) == len(indices)

    @invariant()
    def the_intervals_partition_the_batch(self) -> None:
        if self.state.run_state not in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS):
            return
        round_ = self.state.current_round
        place = round_.data_index
        for batch in assign_data(self.state):
            assert batch.start == place
            place = batch.end + 1
        assert place == round_.data_index + round_batch_size(self.state, round_)

    @invariant()
    def the_state_survives_its_bytes(self) -> None:
        assert postcard.decode(Coordinator, postcard.encode(self.state)) == self.state


Run.TestCase.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
TestRun = pytest.mark.slow(Run.TestCase)
