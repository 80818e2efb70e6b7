"""The contract of a :class:`~distro_optim.coordinator.client.interface.CoordinatorClient`, as checks for any of them.

Bring an :class:`Arena`, which holds a run and makes clients for it, and await each of :data:`CHECKS` with a fresh one::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_client(check):
        async def run():
            async with MyArena() as arena:
                await check(arena)

        asyncio.run(run())

Time stands still unless a check moves it, so nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final

from ..coordinator.client.interface import CoordinatorClient
from ..coordinator.messages import CheckpointMessage
from ..coordinator.model import (
    LLM,
    ConstantLR,
    DummyCheckpoint,
    DummyData,
    DummyOptimizer,
    Hub,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
)
from ..coordinator.rules.committee import CommitteeSelection
from ..coordinator.types import (
    ClientState,
    Coordinator,
    CoordinatorConfig,
    MerkleRoot,
    NodeIdentity,
    RunState,
    Witness,
    WitnessBloom,
    WitnessMetadata,
    WitnessProof,
)
from ..errors import CoordinatorLinkError, JoinRefusedError
from ..verify.bloom import BloomFilter
from ..verify.merkle import merkle_root

__all__ = ["CHECKS", "DUMMY_CONFIG", "Arena", "Follower", "dummy_run", "metadata", "report"]

PATIENCE_SECONDS: Final = 60.0
"""How long a check waits for a state before it fails; never reached when all is well."""

DUMMY_CONFIG: Final = CoordinatorConfig(
    warmup_time=10,
    cooldown_time=5,
    max_round_train_time=15,
    round_witness_time=3,
    global_batch_size_warmup_tokens=0,
    epoch_time=60,
    total_steps=1000,
    init_min_clients=3,
    min_clients=2,
    witness_nodes=0,
    global_batch_size_start=8,
    global_batch_size_end=8,
    verification_percent=0,
    waiting_for_members_extra_time=3,
)


def dummy_run(run_id: str = "dummy", config: CoordinatorConfig = DUMMY_CONFIG) -> Coordinator:
    """A run without tensors that waits for members since second 0: dummy model, data and optimizer."""
    model = LLM(
        max_seq_len=16,
        cold_start_warmup_steps=0,
        architecture=LLMArchitecture.HF_LLAMA,
        checkpoint=DummyCheckpoint(HubRepo("dummy/model")),
        data_type=LLMTrainingDataType.PRETRAINING,
        data_location=DummyData(),
        lr_schedule=ConstantLR(0.0, 0.0, 0),
        optimizer=DummyOptimizer(),
    )
    return Coordinator(run_id, RunState.WAITING_FOR_MEMBERS, model, config)


def report(
    proof: WitnessProof, participants: Iterable[NodeIdentity], results: Iterable[bytes] = (), entropy: bytes = bytes(64)
) -> Witness:
    """The report of a witness that saw these clients take part, and results with these hashes.

    Args:
        entropy: 64 bytes, the keys of its Bloom filters.
    """
    heard, seen = BloomFilter.from_entropy(entropy), BloomFilter.from_entropy(entropy)
    heard.add_many([hashlib.sha256(identity.signer).digest() for identity in participants])
    hashes = list(results)
    seen.add_many(hashes)
    return Witness(
        proof,
        WitnessBloom(heard.keys, heard.words),
        WitnessBloom(seen.keys, seen.words),
        MerkleRoot(merkle_root(hashes)),
    )


def metadata(step: int) -> WitnessMetadata:
    """What a witness measured in the round of ``step``; made up."""
    return WitnessMetadata(step, 1000.0, 10.0, 2.5, (), (), 0, 0.5)


class Arena(ABC):
    """A :func:`dummy_run` and a clock that starts at 0 and that only :meth:`advance` moves.

    Attributes:
        can_leave: whether the coordinator learns that a client has closed. On a blockchain nobody can leave; who closes
            is in the run until its epoch ends without it.
        hosts_one_run: whether a client that asks for another run is told which one there is.
    """

    can_leave: bool = True
    hosts_one_run: bool = True

    @abstractmethod
    def client(self, number: int, run_id: str | None = None) -> CoordinatorClient:
        """A new participant, not yet joined; the same number has the same key. By default for the arena's run."""

    @abstractmethod
    async def advance(self, seconds: int) -> None:
        """Moves the clock and lets the coordinator tick once."""

    @property
    @abstractmethod
    def state(self) -> Coordinator:
        """The coordinator's own state."""


class Follower:
    """A client and the stream of its states."""

    def __init__(self, client: CoordinatorClient) -> None:
        self.client = client
        self._states: AsyncIterator[Coordinator] = client.states()
        self.state: Coordinator | None = None

    async def until(self, wanted: Callable[[Coordinator], bool]) -> Coordinator:
        """Reads states until one is as wanted."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.state is None or not wanted(self.state):
                self.state = await anext(self._states)
        return self.state

    async def in_phase(self, run_state: RunState) -> Coordinator:
        """Reads states until the run is in this phase."""
        return await self.until(lambda state: state.run_state is run_state)

    @property
    def latest(self) -> Coordinator:
        """The last state that was read.

        Raises:
            AssertionError: none was read yet.
        """
        if self.state is None:
            raise AssertionError("no state has been read yet: call until() first")
        return self.state

    def index(self) -> int:
        """Our place in the list of the epoch."""
        return [listed.id for listed in self.latest.epoch_state.clients].index(self.client.identity)

    def proof(self) -> WitnessProof:
        """Our proof of being a witness of the current round."""
        return CommitteeSelection.for_round(self.latest, self.latest.current_round).get_witness(self.index())


async def joined(arena: Arena, count: int) -> list[Follower]:
    """The first ``count`` participants of the arena, in the run."""
    followers = [Follower(arena.client(number)) for number in range(count)]
    for follower in followers:
        await follower.client.join()
    return followers


async def warmed_up(arena: Arena, count: int = 3) -> list[Follower]:
    """The same, once the run is in its warm-up."""
    followers = await joined(arena, count)
    await arena.advance(3)
    for follower in followers:
        await follower.in_phase(RunState.WARMUP)
    return followers


async def training(arena: Arena, count: int = 3) -> list[Follower]:
    """The same, once the first round has begun."""
    followers = await warmed_up(arena, count)
    for follower in followers:
        index = follower.index()
        await follower.client.warmup_witness(Witness(WitnessProof(index, index, False)))
    for follower in followers:
        await follower.in_phase(RunState.ROUND_TRAIN)
    return followers


async def witnessed_round(arena: Arena, followers: list[Follower], participants: Iterable[NodeIdentity]) -> None:
    """All report that these took part; the next round begins."""
    participants = list(participants)
    step = arena.state.progress.step
    for follower in followers:
        await follower.client.witness(report(follower.proof(), participants), metadata(step))
    for follower in followers:
        await follower.in_phase(RunState.ROUND_WITNESS)
    await arena.advance(DUMMY_CONFIG.round_witness_time)
    for follower in followers:
        await follower.until(lambda state: state.progress.step == step + 1)


async def unwitnessed_epoch_end(arena: Arena, followers: list[Follower]) -> None:
    """Nobody reports, so the epoch ends with the round."""
    await arena.advance(DUMMY_CONFIG.max_round_train_time)
    await arena.advance(DUMMY_CONFIG.round_witness_time)
    await arena.advance(DUMMY_CONFIG.cooldown_time)
    for follower in followers:
        await follower.in_phase(RunState.WAITING_FOR_MEMBERS)


async def close_all(followers: Iterable[Follower]) -> None:
    """Closes the clients of all followers."""
    for follower in followers:
        await follower.client.close()


# -- the checks --------------------------------------------------------------------------------------------------------


async def joining_returns_the_state_of_the_run(arena: Arena) -> None:
    """And the client knows that state from then on."""
    client = arena.client(1)
    known: list[Coordinator | None] = [client.state]
    state = await client.join()
    known.append(client.state)
    assert known == [None, state]
    assert state == arena.state
    assert state.run_id == client.run_id
    await client.close()


async def who_looks_is_not_in_the_run(arena: Arena) -> None:
    """It sees the run go on without it, and joins when it wants to."""
    watcher = arena.client(3)
    state = await watcher.look()
    assert state == watcher.state == arena.state
    await failure(watcher.warmup_witness(Witness(WitnessProof(0, 0, False))), CoordinatorLinkError)
    followers = await warmed_up(arena)
    await until_true(lambda: watcher.state == arena.state)
    listed = [client.id for client in arena.state.epoch_state.clients]
    assert listed == [follower.client.identity for follower in followers]
    joining = asyncio.ensure_future(watcher.join())
    while not joining.done():  # a coordinator shows with a tick that it has read a join
        await arena.advance(0)
        await asyncio.sleep(0)
    newcomer = Follower(watcher)
    assert await newcomer.in_phase(RunState.WARMUP) == await joining
    await arena.advance(DUMMY_CONFIG.warmup_time)
    await unwitnessed_epoch_end(arena, [*followers, newcomer])
    await arena.advance(DUMMY_CONFIG.waiting_for_members_extra_time)
    state = await newcomer.in_phase(RunState.WARMUP)
    assert watcher.identity in [client.id for client in state.epoch_state.clients]
    await close_all([*followers, newcomer])


async def the_wrong_run_is_seen_by_looking(arena: Arena) -> None:
    """Nobody has to ask to be in it."""
    client = arena.client(1, run_id="another")
    error = await failure(client.look(), JoinRefusedError)
    assert (error.wanted, error.hosted) == ("another", arena.state.run_id if arena.hosts_one_run else None)
    await client.close()


async def all_who_joined_are_in_the_epoch(arena: Arena) -> None:
    """In the order in which they joined."""
    followers = await warmed_up(arena)
    for follower in followers:
        listed = [listed.id for listed in follower.state.epoch_state.clients] if follower.state else []
        assert listed == [other.client.identity for other in followers]
    await close_all(followers)


async def training_begins_when_all_are_ready(arena: Arena) -> None:
    """All three of them are in the round."""
    followers = await training(arena)
    assert arena.state.current_round.clients_len == 3
    await close_all(followers)


async def all_reports_end_the_round(arena: Arena) -> None:
    """The next one begins, and the reports are in the state."""
    followers = await training(arena)
    await witnessed_round(arena, followers, [follower.client.identity for follower in followers])
    assert arena.state.current_round.height == 1
    assert [len(round_.witnesses) for round_ in arena.state.epoch_state.rounds] == [3, 0, 0, 0]
    await close_all(followers)


async def a_health_check_drops_the_idle(arena: Arena) -> None:
    """A client that takes part in no round is dropped from the epoch."""
    followers = await training(arena)
    idle = followers[2]
    seen = [follower.client.identity for follower in followers[:2]]
    for _ in range(2):
        await witnessed_round(arena, followers, seen)
    selection = CommitteeSelection.for_round(arena.state, arena.state.previous_round)
    check = (idle.client.identity, selection.get_committee(idle.index()))
    await followers[0].client.health_check([check])

    def dropped(state: Coordinator) -> bool:
        return state.epoch_state.clients[check[1].index].state is ClientState.DROPPED

    for follower in followers:
        await follower.until(dropped)
    await close_all(followers)


async def an_uploaded_checkpoint_is_known_to_all(arena: Arena) -> None:
    """It comes to every client in the next state."""
    followers = await training(arena)
    # A built-in model takes no upload; after an epoch that lost everybody the stored one is in its place.
    await unwitnessed_epoch_end(arena, followers)
    await arena.advance(DUMMY_CONFIG.waiting_for_members_extra_time)
    for follower in followers:
        await follower.in_phase(RunState.WARMUP)
    assert arena.state.model.checkpoint == Hub(HubRepo("dummy/model"))
    await followers[1].client.send(CheckpointMessage(Hub(HubRepo("new/model", "step7"))))
    uploaded = Hub(HubRepo("new/model", "step7"))
    await until_true(lambda: arena.state.model.checkpoint == uploaded)
    await arena.advance(0)
    for follower in followers:
        await follower.until(lambda state: state.model.checkpoint == uploaded)
    await close_all(followers)


async def the_wrong_run_is_refused_by_name(arena: Arena) -> None:
    """The error carries the run that was asked for and the one that is hosted."""
    client = arena.client(1, run_id="another")
    error = await failure(client.join(), JoinRefusedError)
    assert (error.wanted, error.hosted) == ("another", arena.state.run_id if arena.hosts_one_run else None)
    assert "another" in str(error)
    await client.close()


async def who_closes_leaves_the_epoch(arena: Arena) -> None:
    """The others go on without it."""
    followers = await warmed_up(arena, 4)
    gone = followers.pop(1)
    await gone.client.close()
    if not arena.can_leave:
        await arena.advance(1)
        assert [listed.id for listed in arena.state.epoch_state.clients][1] == gone.client.identity
        await close_all(followers)
        return
    # As withdrawn it is listed only until the next tick, which may come before anybody looks.
    await until_true(lambda: gone.client.identity not in healthy(arena.state))
    await arena.advance(1)
    for follower in followers:
        state = await follower.until(lambda state: len(state.epoch_state.clients) == 3)
        assert gone.client.identity not in [listed.id for listed in state.epoch_state.clients]
    await close_all(followers)


async def who_left_can_come_back_for_the_next_epoch(arena: Arena) -> None:
    """With the same key."""
    followers = await warmed_up(arena)
    await close_all(followers[1:])
    if arena.can_leave:
        await until_true(lambda: len(healthy(arena.state)) == 1)
        await arena.advance(1)
    else:
        await arena.advance(DUMMY_CONFIG.warmup_time)
        await unwitnessed_epoch_end(arena, followers[:1])
    await followers[0].in_phase(RunState.WAITING_FOR_MEMBERS)
    back = [Follower(arena.client(number)) for number in (1, 2)]
    for follower in back:
        await follower.client.join()
    await arena.advance(DUMMY_CONFIG.waiting_for_members_extra_time)
    for follower in (followers[0], *back):
        state = await follower.in_phase(RunState.WARMUP)
        assert len(state.epoch_state.clients) == 3
    await close_all([followers[0], *back])


async def who_was_dropped_can_come_back_for_the_next_epoch(arena: Arena) -> None:
    """Its client asks again by itself."""
    followers = await training(arena)
    seen = [follower.client.identity for follower in followers[:2]]
    for _ in range(2):
        await witnessed_round(arena, followers, seen)
    selection = CommitteeSelection.for_round(arena.state, arena.state.previous_round)
    check = (followers[2].client.identity, selection.get_committee(followers[2].index()))
    await followers[0].client.health_check([check])
    await followers[0].until(lambda state: state.epoch_state.clients[check[1].index].state is ClientState.DROPPED)
    await unwitnessed_epoch_end(arena, followers)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while arena.state.run_state is RunState.WAITING_FOR_MEMBERS:  # for the dropped one, which asks again by itself
            await arena.advance(1)
            await asyncio.sleep(0)
    for follower in followers:
        state = await follower.in_phase(RunState.WARMUP)
        assert len(state.epoch_state.clients) == 3
    await close_all(followers)


async def the_states_end_when_the_client_is_closed(arena: Arena) -> None:
    """Closing it twice does no harm."""
    client = arena.client(1)
    await client.join()

    async def read_all() -> int:
        return len([state async for state in client.states()])

    reader = asyncio.create_task(read_all())
    await asyncio.sleep(0)
    await client.close()
    await client.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await reader >= 1


async def equal_states_come_once(arena: Arena) -> None:
    """A tick that changes nothing sends no state."""
    (follower,) = await joined(arena, 1)
    for _ in range(5):
        await arena.advance(0)
    await follower.client.close()
    seen = [state async for state in follower.client.states()]
    assert len(seen) == 1


async def nothing_can_be_sent_outside_of_the_run(arena: Arena) -> None:
    """Neither before joining nor after closing."""
    client = arena.client(1)
    await failure(client.warmup_witness(Witness(WitnessProof(0, 0, False))), CoordinatorLinkError)
    await client.join()
    await client.close()
    await failure(client.warmup_witness(Witness(WitnessProof(0, 0, False))), CoordinatorLinkError)


async def a_refused_message_harms_nobody(arena: Arena) -> None:
    """The round goes on as if it had never been sent."""
    followers = await training(arena)
    before = arena.state
    await followers[0].client.witness(Witness(WitnessProof(12345, 99, True)), metadata(1))
    await followers[0].client.health_check([])
    await followers[0].client.warmup_witness(Witness(WitnessProof(2**64 - 1, 2**64 - 1, True)))
    await witnessed_round(arena, followers, [])
    assert arena.state.progress.step == before.progress.step + 1
    await close_all(followers)


CHECKS: Final[list[Callable[[Arena], Awaitable[None]]]] = [
    joining_returns_the_state_of_the_run,
    who_looks_is_not_in_the_run,
    the_wrong_run_is_seen_by_looking,
    all_who_joined_are_in_the_epoch,
    training_begins_when_all_are_ready,
    all_reports_end_the_round,
    a_health_check_drops_the_idle,
    an_uploaded_checkpoint_is_known_to_all,
    the_wrong_run_is_refused_by_name,
    who_closes_leaves_the_epoch,
    who_left_can_come_back_for_the_next_epoch,
    who_was_dropped_can_come_back_for_the_next_epoch,
    the_states_end_when_the_client_is_closed,
    equal_states_come_once,
    nothing_can_be_sent_outside_of_the_run,
    a_refused_message_harms_nobody,
]


def healthy(state: Coordinator) -> list[NodeIdentity]:
    """The clients of the epoch that have neither left nor been dropped."""
    return [listed.id for listed in state.epoch_state.clients if listed.state is ClientState.HEALTHY]


async def failure(attempt: Awaitable[Any], expected: type[CoordinatorLinkError]) -> Any:
    """The error of an attempt that must fail in this way.

    Raises:
        AssertionError: the attempt did not fail.
    """
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await attempt
    except expected as error:
        return error
    raise AssertionError(f"no {expected.__name__} was raised")


async def until_true(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until ``condition()`` holds; for what stays so, since much can happen between two looks."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)
