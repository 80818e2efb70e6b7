"""The swarm over iroh keeps the promises of every swarm, with real nodes on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import pytest
from typing_extensions import override

from distro_optim.comm.announcements import InboxLimits
from distro_optim.comm.iroh.blobs.store import MemoryStore
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.swarm import IrohSwarm, topic_of_run
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.swarm import Channel, Swarm
from distro_optim.comm.tickets import BlobFormat, BlobTicket
from distro_optim.errors import ConfigurationError, NodeClosedError, StoreFullError
from distro_optim.testing.swarm_checks import CHECKS, SwarmArena

pytestmark = pytest.mark.waiting


SECONDS = 60.0
TOPIC = topic_of_run("test")


class IrohArena(SwarmArena):
    def __init__(self, loop: LoopThread) -> None:
        self.loop = loop
        self.swarms: list[IrohSwarm] = []

    @override
    async def make(self, *, allowed: Iterable[bytes] | None = None, queued_per_sender: int | None = None) -> Swarm:
        node = Node(bind_addr="127.0.0.1:0", relay="none", allowed=allowed, loop=self.loop)
        await node.bind()
        limits = InboxLimits(queued_per_sender=queued_per_sender) if queued_per_sender else None
        swarm = IrohSwarm(node, TOPIC, inbox_limits=limits)
        for other in self.swarms:
            other.node.addresses.add(node.addr())
        await swarm.join([other.node.addr() for other in self.swarms])
        self.swarms.append(swarm)
        return swarm

    @override
    async def settle(self) -> None:
        async with asyncio.timeout(SECONDS):
            while any(len(swarm.neighbors) < len(self.swarms) - 1 for swarm in self.swarms):
                await asyncio.sleep(0.005)

    @override
    async def __aexit__(self, *_: object) -> None:
        for swarm in self.swarms:
            await swarm.aclose()
            await swarm.node.aclose()


@pytest.fixture
def loop_thread() -> Iterable[LoopThread]:
    thread = LoopThread("test-network")
    yield thread
    thread.stop()


def in_arena(loop: LoopThread, check: Callable[[IrohArena], Awaitable[None]]) -> None:
    async def run() -> None:
        async with IrohArena(loop) as arena:
            await check(arena)

    loop.run(run(), SECONDS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_iroh_swarm_keeps_every_promise(
    loop_thread: LoopThread, check: Callable[[SwarmArena], Awaitable[None]]
) -> None:
    in_arena(loop_thread, check)


def test_the_topic_of_a_run_is_that_of_psyche() -> None:
    assert TOPIC.hex() == "c86349253ffdd24058fa20d3bbde5c8db1c75f0380a8f86c83c8b0423d9837e2"


def test_gossip_hears_how_many_others_are_allowed_before_and_after_a_topic_is_entered(loop_thread: LoopThread) -> None:
    async def check(arena: IrohArena) -> None:
        alice, bob = await arena.make(), await arena.make(allowed=[bytes(32), bytes(31) + b"\x01"])
        assert isinstance(alice, IrohSwarm)
        assert isinstance(bob, IrohSwarm)

        def others(swarm: IrohSwarm) -> list[int | None]:
            return [state.broadcast.others for state in swarm.gossip.protocol.topics.values()]

        assert others(alice) == [None]
        assert others(bob) == [2]
        alice.set_allowed([bob.peer_id, alice.peer_id, bytes(32)])
        assert others(alice) == [2]
        await alice.announce(b"on the other channel, too", channel=Channel.OWN_KIND)
        assert others(alice) == [2, 2]
        alice.set_allowed(None)
        assert others(alice) == [None, None]

    in_arena(loop_thread, check)


def test_swarms_of_other_runs_are_not_heard(loop_thread: LoopThread) -> None:
    async def check(arena: IrohArena) -> None:
        alice = await arena.make()
        node = Node(bind_addr="127.0.0.1:0", relay="none", loop=loop_thread)
        other = IrohSwarm(node, topic_of_run("another"))
        await node.bind()
        await other.join([alice.node.addr()])  # type: ignore[attr-defined]
        bob = await arena.make()
        await arena.settle()
        await other.announce(b"unheard")
        await bob.announce(b"heard")
        assert (await anext(alice.announcements())).data == b"heard"
        assert alice.counts.accepted == 1
        await node.aclose()

    in_arena(loop_thread, check)


def test_a_fetch_without_a_tag_leaves_nothing_in_the_store(loop_thread: LoopThread) -> None:
    async def check(arena: IrohArena) -> None:
        alice, bob = await arena.make(), await arena.make()
        assert isinstance(bob, IrohSwarm)
        ticket = await alice.publish(bytes(100_000), "tag")
        await bob.fetch(ticket, max_size=100_000)
        assert bob.store.used_bytes == 0
        await bob.fetch(ticket, max_size=100_000, tag="kept")
        assert bob.store.used_bytes >= 100_000

    in_arena(loop_thread, check)


def test_the_limit_of_the_store_holds_for_both_directions(loop_thread: LoopThread) -> None:
    async def check(arena: IrohArena) -> None:
        alice, bob = await arena.make(), await arena.make()
        assert isinstance(bob, IrohSwarm)
        store = bob.store
        assert isinstance(store, MemoryStore)
        store.max_bytes = 150_000
        ticket = await alice.publish(bytes(100_000), "tag")
        await bob.fetch(ticket, max_size=1 << 20, tag="first")
        with pytest.raises(StoreFullError):
            await bob.publish(b"x" * 100_000, "second")
        with pytest.raises(StoreFullError):
            await bob.fetch(await alice.publish(b"y" * 100_000, "other"), max_size=1 << 20, tag="third")
        bob.forget(lambda tag: tag == "first")
        await bob.publish(b"x" * 100_000, "second")

    in_arena(loop_thread, check)


def test_sequences_of_blobs_are_not_fetched(loop_thread: LoopThread) -> None:
    async def check(arena: IrohArena) -> None:
        alice = await arena.make()
        ticket = await alice.publish(b"x" * 32, "tag")
        with pytest.raises(ConfigurationError, match="raw"):
            await alice.fetch(BlobTicket(ticket.addr, BlobFormat.HASH_SEQ, ticket.hash), max_size=100)

    in_arena(loop_thread, check)


def test_closing_the_node_closes_the_swarm(loop_thread: LoopThread) -> None:
    async def check(arena: IrohArena) -> None:
        alice = await arena.make()
        assert isinstance(alice, IrohSwarm)
        await alice.node.aclose()
        with pytest.raises(NodeClosedError):
            await alice.announce(b"x")
        assert [announcement async for announcement in alice.announcements()] == []

    in_arena(loop_thread, check)
