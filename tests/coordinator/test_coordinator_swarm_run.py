"""Eight clients without tensors train three epochs over TCP and over iroh while members leave, crash, idle and join.

Each member does what a training client does and nothing else: it says when it is ready, trains the interval that it
computes for itself, commits to the result, tells the others, reports as a witness what it heard, names whom nobody
heard, and counts what a quorum saw. Results are empty, so a commitment is the hash of step and interval. Only gossip
is replaced, by a dictionary; time moves when every member has done all it can.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from coordinator.coordinator_arenas import IrohArena, ServedArena, TcpArena
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.rules.assignment import assign_data, batch_ids_for_round
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.rules.consensus import is_healthy, select_commitment, witness_quorum
from distro_optim.coordinator.types import (
    BatchId,
    ClientState,
    Coordinator,
    NodeIdentity,
    RunState,
    Witness,
    WitnessProof,
)
from distro_optim.errors import CoordinatorError
from distro_optim.testing.coordinator import DUMMY_CONFIG, dummy_run, metadata, report
from distro_optim.verify.commitment import Commitment, training_result_hash

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


EPOCHS = 3
POLL_SECONDS = 0.002
PATIENCE_SECONDS = 60.0  # never reached when all is well
CONFIG = replace(
    DUMMY_CONFIG, init_min_clients=4, min_clients=3, epoch_time=18, global_batch_size_start=21, global_batch_size_end=21
)


@dataclass
class Gossip:
    """What has been announced: by step, interval -> (who, commitment), in order."""

    results: dict[int, dict[BatchId, list[tuple[NodeIdentity, Commitment]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )


class Member:
    """One client."""

    def __init__(self, number: int, arena: ServedArena, gossip: Gossip) -> None:
        client = arena.client(number)
        assert isinstance(client, RemoteCoordinator)
        self.client = client
        self.gossip = gossip
        self.idle = False
        self.acted: Coordinator | None = None
        self.trained: list[tuple[int, BatchId]] = []
        self.applied: dict[tuple[int, BatchId], bytes] = {}
        self._done: set[object] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Member:
        await self.client.join()
        self._task = asyncio.create_task(self._follow())
        return self

    async def leave(self) -> None:
        await self.client.close()
        assert self._task is not None
        await self._task

    async def crash(self) -> None:
        """The connection breaks without a word."""
        assert self.client._connection is not None
        await self.client._connection._stream.close()

    async def _follow(self) -> None:
        async for state in self.client.states():
            await self._act(state)
            self.acted = state

    def _once(self, *what: object) -> bool:
        if what in self._done:
            return False
        self._done.add(what)
        return True

    async def _act(self, state: Coordinator) -> None:
        ids = [member.id for member in state.epoch_state.clients]
        if self.client.identity not in ids:
            return
        index = ids.index(self.client.identity)
        epoch, height = state.progress.epoch, state.current_round.height
        if state.run_state is RunState.WARMUP and self._once("ready", epoch):
            await self.client.warmup_witness(Witness(WitnessProof(index, index, False)))
        elif state.run_state is RunState.ROUND_TRAIN and self._once("round", epoch, height):
            self._apply(state)
            await self._name_the_idle(state)
            if not state.epoch_state.last_step and not self.idle:
                self._train(state)
            await self._report(state, index)

    def _train(self, state: Coordinator) -> None:
        step = state.progress.step
        for batch, owner in assign_data(state).items():
            if owner == self.client.identity:
                commitment = Commitment(training_result_hash(step, batch.start, batch.end, []), bytes(64))
                self.gossip.results[step][batch].append((owner, commitment))
                self.trained.append((step, batch))

    async def _report(self, state: Coordinator, index: int) -> None:
        """What was heard of the round before."""
        proof = CommitteeSelection.for_round(state, state.current_round).get_witness(index)
        if not proof.witness:
            return
        heard = self.gossip.results[state.progress.step - 1] if state.current_round.height else {}
        results = [result for batch in sorted(heard) for result in heard[batch]]
        saw = report(
            proof,
            [who for who, _ in results],
            [commitment.data_hash for _, commitment in results],
            entropy=hashlib.sha512(self.client.identity.signer).digest(),
        )
        await self.client.witness(saw, metadata(state.progress.step))

    async def _name_the_idle(self, state: Coordinator) -> None:
        if state.current_round.height < 2:
            return
        selection = CommitteeSelection.for_round(state, state.previous_round)
        checks = []
        for place, member in enumerate(state.epoch_state.clients):
            proof = selection.get_committee(place)
            try:
                healthy = is_healthy(state, member.id, proof)
            except CoordinatorError:
                continue
            if not healthy:
                checks.append((member.id, proof))
        if checks:
            await self.client.health_check(checks)

    def _apply(self, state: Coordinator) -> None:
        """The results of two rounds ago that a quorum of witnesses saw."""
        round_, reports = state.previous_previous_round, state.previous_round
        if state.current_round.height < 2 or round_ is None or reports is None:
            return
        step = state.progress.step - 2
        quorum = witness_quorum(state.config.witness_nodes, len(reports.witnesses))
        for batch in batch_ids_for_round(state, round_, round_.clients_len):
            commitments = [commitment for _, commitment in self.gossip.results[step][batch]]
            chosen = select_commitment(commitments, reports.witnesses, quorum)
            if chosen is not None:
                self.applied[step, batch] = commitments[chosen].data_hash


async def eventually(condition: Callable[[], bool]) -> None:
    """Lets bytes travel until ``condition`` holds, however long the machine takes."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(POLL_SECONDS)


class Conductor:
    """Moves the time when nobody has anything left to do."""

    def __init__(self, arena: ServedArena) -> None:
        self.arena = arena
        self.members: list[Member] = []
        self.rounds: dict[int, tuple[int, int, int, bool]] = {}  # step -> epoch, first index, size, trains
        self.listed: dict[tuple[int, int], list[NodeIdentity]] = {}  # epoch, height -> clients

    async def settle(self) -> Coordinator:
        """Waits until every member has acted on the present state, and nothing comes of it."""
        quiet = 0
        while quiet < 2:
            before = self.arena.state
            await self.arena.advance(0)
            await eventually(lambda: all(member.acted == self.arena.state for member in self.members))
            quiet = quiet + 1 if self.arena.state is before else 0
        self._note(self.arena.state)
        return self.arena.state

    async def step(self) -> Coordinator:
        in_witness = self.arena.state.run_state is RunState.ROUND_WITNESS
        await self.arena.advance(CONFIG.round_witness_time if in_witness else 1)
        return await self.settle()

    async def without(self, member: Member) -> None:
        """Lets a member leave, and the server see that: until then it gives the member data as before."""
        identity = member.client.identity

        def seen_to_go() -> bool:
            listed = {client.id: client.state for client in self.arena.state.epoch_state.clients}
            return listed.get(identity) is not ClientState.HEALTHY

        await member.leave()
        await eventually(seen_to_go)

    async def back(self, member: Member) -> None:
        """Breaks a member's connection, and lets it join anew before the run goes on."""
        service, identity = self.arena.service, member.client.identity
        broken = service.clients[identity]

        def joined_anew() -> bool:
            return service.clients.get(identity, broken) is not broken and identity in service.host.pending

        await member.crash()
        await eventually(joined_anew)

    async def until(self, epoch: int, height: int) -> Coordinator:
        """Lets the run go on to the training of a round."""
        for _ in range(500):
            state = await self.step()
            here = (state.progress.epoch, state.current_round.height)
            if here >= (epoch, height) and state.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS):
                return state
        raise AssertionError(f"round {height} of epoch {epoch} was never reached: {self.arena.state}")

    def _note(self, state: Coordinator) -> None:
        if state.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS):
            round_ = state.current_round
            trains = not state.epoch_state.last_step
            size = state.config.global_batch_size_end
            self.rounds.setdefault(state.progress.step, (state.progress.epoch, round_.data_index, size, trains))
            ids = [member.id for member in state.epoch_state.clients]
            self.listed.setdefault((state.progress.epoch, round_.height), ids)


async def run_swarm(arena: ServedArena) -> None:
    gossip = Gossip()
    async with arena:
        conductor = Conductor(arena)
        members = conductor.members
        for number in range(1, 9):
            members.append(await Member(number, arena, gossip).start())
        first = list(members)

        # Epoch 0: one leaves, one connection breaks, one joins for the next epoch.
        await conductor.until(0, 1)
        leaver = members.pop(6)
        await conductor.without(leaver)
        await conductor.until(0, 3)
        newcomer = await Member(9, arena, gossip).start()
        members.append(newcomer)
        assert leaver.client.identity not in conductor.listed[0, 3]

        # Epoch 1: one trains no more and is dropped.
        await conductor.until(1, 1)
        assert set(conductor.listed[1, 0]) == {member.client.identity for member in members}
        idler = members[4]
        idler.idle = True
        state = await conductor.until(1, 6)
        assert idler.client.identity not in [client.id for client in state.epoch_state.clients]
        idler.idle = False

        # Epoch 2: it is back; a member loses its connection between two epochs and is in this one nevertheless.
        while arena.state.run_state is not RunState.COOLDOWN:
            await conductor.step()
        await conductor.back(members[0])
        await conductor.until(2, 0)
        assert {idler.client.identity, members[0].client.identity} <= set(conductor.listed[2, 0])
        for _ in range(300):
            if arena.state.progress.epoch == EPOCHS:
                break
            await conductor.step()
        assert arena.state.progress.epoch == EPOCHS

        check_rounds(conductor, arena.state)
        check_training(conductor, {*first, newcomer})
        for member in members:
            assert member.client.state == arena.state
        for member in members:
            await member.leave()


def check_rounds(conductor: Conductor, final: Coordinator) -> None:
    """The rounds follow each other without gap in steps and data; each epoch skips two at its end."""
    place = 0
    for number, step in enumerate(sorted(conductor.rounds), start=1):
        epoch, index, size, trains = conductor.rounds[step]
        assert (step, index) == (number, place)
        place += size
        last_two = [s for s, round_ in sorted(conductor.rounds.items()) if round_[0] == epoch][-2:]
        assert trains == (step not in last_two)
    assert final.progress.epoch_start_data_index == place
    assert {round_[0] for round_ in conductor.rounds.values()} == set(range(EPOCHS))


def check_training(conductor: Conductor, members: set[Member]) -> None:
    """What was trained was trained once, and all who were there applied the same."""
    trained = [batch for member in members for batch in member.trained]
    assert len(set(trained)) == len(trained)
    by_step: dict[int, int] = defaultdict(int)
    for step, batch in trained:
        by_step[step] += len(batch)
    for step, (_, _, size, trains) in conductor.rounds.items():
        assert by_step[step] <= size
        if trains and step < 4:
            assert by_step[step] == size  # before anyone was idle
    assert not any(by_step[step] for step, round_ in conductor.rounds.items() if not round_[3])

    applied: dict[tuple[int, BatchId], bytes] = {}
    for member in members:
        for result, data_hash in member.applied.items():
            assert applied.setdefault(result, data_hash) == data_hash
    announced = {(step, batch) for step, batch in trained}
    assert set(applied) == announced


@pytest.mark.parametrize("arena", [TcpArena, IrohArena])
def test_eight_clients_train_three_epochs_while_members_come_and_go(arena: type[ServedArena]) -> None:
    asyncio.run(run_swarm(arena(dummy_run(config=CONFIG))))
