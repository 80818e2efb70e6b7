"""A coordinator lets some look at its run who take no part in it, and tells its members who they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.framing import Else, encode_frame
from distro_optim.comm.iroh.meeting_place import MeetingPlace
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    ClientToServerMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.types import Witness, WitnessProof
from distro_optim.coordinator.watchers import MAX_WATCHERS, ask_who_watches, watcher_keys
from distro_optim.coordinator.why_closed import WhyClosed, ask_why
from distro_optim.errors import ConfigurationError, JoinRefusedError
from distro_optim.testing.coordinator import dummy_run, metadata

from .coordinator_arenas import ClockedService, IrohArena, MemoryArena, ServedArena, TcpArena, key

pytestmark = pytest.mark.waiting

SECONDS = 30.0
WATCHER = 9
PROOF = WitnessProof(position=0, index=0, witness=False)
AT_ONCE = BackoffPolicy(first=0.001, longest=0.001)


class WatchedService(ClockedService):
    """Lets one watch."""

    def __init__(self, host: RunHost) -> None:
        super().__init__(host)
        self.watchers = self.meeting_place.watchers = frozenset([key(WATCHER).public])


def client_of(arena: ServedArena, number: int) -> RemoteCoordinator:
    return RemoteCoordinator(arena.connect, key(number), arena.state.run_id, backoff=AT_ONCE, name="home")


async def asked(arena: ServedArena, number: int) -> frozenset[bytes] | None:
    stream = await arena.connect()
    try:
        return await ask_who_watches(stream, key(number))
    finally:
        await stream.close()


def watched(
    work: Callable[[ServedArena], Awaitable[None]],
    kind: type[ServedArena] = MemoryArena,
    host: RunHost | None = None,
) -> None:
    async def run() -> None:
        arena = kind()
        arena.service = WatchedService(host or RunHost(dummy_run()))
        async with asyncio.timeout(SECONDS), arena:
            await work(arena)

    asyncio.run(run())


@pytest.mark.parametrize("kind", [TcpArena, IrohArena, MemoryArena])
def test_it_gets_the_states_and_is_in_no_list(kind: type[ServedArena]) -> None:
    async def work(arena: ServedArena) -> None:
        watcher, member = client_of(arena, WATCHER), client_of(arena, 1)
        await watcher.look()
        await member.join()
        before = arena.state
        async for state in watcher.states():
            if state == before:
                break
        assert [client.p2p_identity for client in arena.service.host.pending] == [key(1).public]
        await watcher.close()
        await member.close()

    watched(work, kind)


SAID: dict[str, ClientToServerMessage] = {
    "join": Join("dummy"),
    "report": WitnessMessage(WitnessStep(Witness(PROOF), metadata(1))),
    "warm-up report": WitnessMessage(WarmupStep(Witness(PROOF))),
    "health check": HealthCheckMessage(()),
}


@pytest.mark.parametrize("what", SAID)
def test_whatever_it_says_it_is_cut_off_and_nothing_changes(what: str) -> None:
    async def work(arena: ServedArena) -> None:
        watcher = client_of(arena, WATCHER)
        state = await watcher.look()
        connection = watcher._connection
        assert connection is not None
        await connection.write(encode_frame(CLIENT_TO_SERVER.encode(Else(SAID[what]))))
        while watcher._connection is connection:
            await asyncio.sleep(0.001)
        assert not arena.service.host.pending
        assert arena.state == state
        await watcher.close()

    watched(work)


def test_one_that_asks_to_take_part_hears_that_it_may_not() -> None:
    async def work(arena: ServedArena) -> None:
        with pytest.raises(JoinRefusedError, match="may watch this run, and say nothing: to take part, use another"):
            await client_of(arena, WATCHER).join()

    watched(work)


def test_it_may_look_where_only_some_may_join_but_not_if_it_is_banned() -> None:
    async def work(arena: ServedArena) -> None:
        watcher = client_of(arena, WATCHER)
        await watcher.look()
        await watcher.close()
        with pytest.raises(JoinRefusedError):
            await client_of(arena, 2).look()
        arena.service.ban(key(WATCHER).public, 0.0)
        with pytest.raises(JoinRefusedError, match="banned"):
            await client_of(arena, WATCHER).look()

    watched(work, host=RunHost(dummy_run(), allowed=[key(1).public]))


def test_it_stays_when_those_that_may_join_are_named_anew() -> None:
    async def work(arena: ServedArena) -> None:
        watcher, member = client_of(arena, WATCHER), client_of(arena, 1)
        await watcher.look()
        await member.look()
        arena.service.let_in([key(2).public], asyncio.get_running_loop().time())
        assert {client.signer for client in arena.service.clients} == {key(WATCHER).public}
        await watcher.close()
        await member.close()

    watched(work)


def test_it_is_not_told_that_it_may_not_come_where_only_some_may_join() -> None:
    """When its link has ended for another reason, of which the coordinator knows nothing."""

    async def work(arena: ServedArena) -> None:
        async def why() -> WhyClosed | None:
            stream = await arena.connect()
            try:
                return await ask_why(stream, key(WATCHER))
            finally:
                await stream.close()

        assert await why() is None
        now = asyncio.get_running_loop().time()
        arena.service.kick(key(WATCHER).public, now, "for a while")
        assert await why() == WhyClosed("for a while", may_return=True)
        assert await why() is None
        arena.service.ban(key(WATCHER).public, now, "for good")
        assert await why() == WhyClosed("for good", may_return=False)

    watched(work, host=RunHost(dummy_run(), allowed=[key(1).public]))


@pytest.mark.parametrize("kind", [TcpArena, MemoryArena])
def test_members_and_those_who_watch_are_told_who_watches_and_nobody_else_is(kind: type[ServedArena]) -> None:
    async def work(arena: ServedArena) -> None:
        watches = frozenset([key(WATCHER).public])
        member = client_of(arena, 1)
        assert await asked(arena, 1) is None
        await member.join()
        assert await asked(arena, 1) == watches
        assert await asked(arena, WATCHER) == watches
        assert await asked(arena, 3) is None
        await member.close()

    watched(work, kind)


def test_it_is_told_where_the_members_are_and_they_are_not_told_of_it() -> None:
    place = MeetingPlace(lambda peer: peer in (b"1" * 32, b"2" * 32))
    place.watchers = frozenset([b"9" * 32])

    def at(peer: bytes) -> EndpointAddr:
        return EndpointAddr(peer, (), (SocketAddr.parse("10.0.0.1:4000"),))

    place.visit(b"1" * 32, at(b"1" * 32))
    assert [other.id for other in place.visit(b"9" * 32, at(b"9" * 32))] == [b"1" * 32]
    assert [other.id for other in place.visit(b"2" * 32, at(b"2" * 32))] == [b"1" * 32]
    assert place.place_of(b"9" * 32) is None


def test_keys_are_read_as_users_write_them_and_their_number_is_bounded() -> None:
    keys = [bytes([number]) * 32 for number in range(MAX_WATCHERS)]
    assert watcher_keys([keys[0].hex(), *keys[1:]]) == frozenset(keys)
    for wrong in (["xyz"], [b"short"], [5]):
        with pytest.raises(ConfigurationError, match="is no public key"):
            watcher_keys(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="--observer has 9 keys, and at most 8 may watch"):
        watcher_keys([*keys, bytes([99]) * 32], name="--observer")
