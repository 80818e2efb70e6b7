"""Joining, broadcasting, leaving and finding together again, on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.config import GossipConfig
from distro_optim.comm.iroh.gossip.events import Deliver, NeighborDown, NeighborUp
from distro_optim.comm.iroh.gossip.net import GossipService, Lagged, ServiceLimits
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey
from distro_optim.errors import ConfigurationError, NodeClosedError, PeerTimeoutError
from gossip.live import CALL_SECONDS, count_messages, until

pytestmark = [pytest.mark.waiting]

TOPIC = b"t" * 32
NOBODY = EndpointAddr(SecretKey(b"\x07" * 32).public, (), (SocketAddr.parse("127.0.0.1:1"),))
LOOPBACK: dict[str, Any] = {"relay": "none", "discovery": False}


@pytest.mark.slow
def test_a_node_joins_through_the_one_of_several_bootstrap_peers_that_is_there(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        services = [GossipService(first), GossipService(second)]
        await services[0].join(TOPIC)
        topic = await services[1].join(TOPIC, [NOBODY, b"\x01" * 32, first.addr()])
        await topic.joined(CALL_SECONDS)
        assert topic.neighbors == (first.endpoint_id,)
        for service in services:
            await service.aclose()

    loop_thread.run(scenario(), 60)


def test_a_bootstrap_peer_that_starts_later_is_dialled_again(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    early = make_node()
    late = Node(secret_key=b"\x08" * 32, bind_addr="127.0.0.1:0", loop=loop_thread, **LOOPBACK)

    async def scenario() -> None:
        service = GossipService(early, GossipConfig(rejoin_interval=0.2))
        topic = await service.join(TOPIC, [late.endpoint_id])
        await until(lambda: service._schedule.failures(late.endpoint_id) > 0)
        assert topic.neighbors == ()

        await late.bind()
        early.addresses.add(late.addr())
        other = GossipService(late)
        await other.join(TOPIC)
        await topic.joined(CALL_SECONDS)
        await other.aclose()
        await service.aclose()

    loop_thread.run(scenario(), 60)
    late.close()


def test_a_peer_that_is_restarted_with_its_key_comes_back(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    stays = make_node()

    def incarnation() -> Node:
        return Node(secret_key=b"\x09" * 32, bind_addr="127.0.0.1:0", loop=loop_thread, **LOOPBACK)

    async def scenario() -> None:
        service = GossipService(stays)
        topic = await service.join(TOPIC)
        received: Counter[bytes] = Counter()
        reader = asyncio.create_task(count_messages(topic, received))
        for life in (b"first", b"second"):
            node = incarnation()
            other = GossipService(node)
            again = await other.join(TOPIC, [stays.addr()])
            await again.joined(CALL_SECONDS)
            await again.broadcast(life)
            await until(lambda life=life: received[life] == 1)  # type: ignore[misc]
            await node.aclose()
            await until(lambda: topic.neighbors == ())
        await service.aclose()
        await reader

    loop_thread.run(scenario(), 60)


def test_neighbours_that_come_and_go_are_events_in_order_with_the_messages(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> list[object]:
        services = [GossipService(first), GossipService(second)]
        topic = await services[0].join(TOPIC)
        other = await services[1].join(TOPIC, [first.addr()])
        await other.joined(CALL_SECONDS)
        await other.broadcast(b"hello")
        await other.broadcast_neighbors(b"psst")
        seen: list[object] = []
        async for event in topic.events():
            seen.append(event)
            if isinstance(event, Deliver) and event.content == b"psst":
                await other.leave()
            if isinstance(event, NeighborDown):
                break
        with pytest.raises(NodeClosedError):
            await other.broadcast(b"too late")
        await other.leave()
        for service in services:
            await service.aclose()
        return seen

    peer = second.endpoint_id
    assert loop_thread.run(scenario(), 60) == [
        NeighborUp(peer),
        Deliver(b"hello", peer, 0),
        Deliver(b"psst", peer, None),
        NeighborDown(peer),
    ]


def test_two_topics_share_a_connection_and_leaving_one_keeps_the_other(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        services = [GossipService(first), GossipService(second)]
        received: Counter[bytes] = Counter()
        topics = []
        for name in (b"a" * 32, b"b" * 32):
            topic = await services[0].join(name)
            other = await services[1].join(name, [first.addr()])
            await other.joined(CALL_SECONDS)
            topics.append((topic, other))
        reader = asyncio.create_task(count_messages(topics[1][0], received))
        assert len(first.connections()) == 1

        await topics[0][1].leave()
        await until(lambda: topics[0][0].neighbors == ())
        await topics[1][1].broadcast(b"still here")
        await until(lambda: received[b"still here"] == 1)
        assert len(first.connections()) == 1
        for service in services:
            await service.aclose()
        await reader

    loop_thread.run(scenario(), 60)


def test_both_dial_at_once_and_every_message_arrives_once(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    nodes = [make_node(), make_node()]

    async def scenario() -> None:
        services = [GossipService(node) for node in nodes]
        topics = await asyncio.gather(
            *(service.join(TOPIC, [other.addr()]) for service, other in zip(services, reversed(nodes), strict=True))
        )
        counts: list[Counter[bytes]] = [Counter(), Counter()]
        readers = [asyncio.create_task(count_messages(t, c)) for t, c in zip(topics, counts, strict=True)]
        for topic in topics:
            await topic.joined(CALL_SECONDS)
        for i in range(100):
            for k, topic in enumerate(topics):
                await topic.broadcast(b"%d %d" % (k, i))
        await until(lambda: all(len(c) == 100 for c in counts))
        assert all(set(c.values()) == {1} for c in counts)
        for service in services:
            await service.aclose()
        await asyncio.gather(*readers)

    loop_thread.run(scenario(), 60)


def test_an_application_that_reads_too_slowly_is_told_what_it_missed(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        services = [GossipService(first, limits=ServiceLimits(queue=10)), GossipService(second)]
        topic = await services[0].join(TOPIC)
        other = await services[1].join(TOPIC, [first.addr()])
        await other.joined(CALL_SECONDS)
        for i in range(30):
            await other.broadcast(b"%d" % i)
        await until(lambda: services[0].stats.delivered == 30)
        events = topic.events()
        # 30 messages and one neighbour are 31 events.
        assert await anext(events) == Lagged(21)
        assert await anext(events) == Deliver(b"20", second.endpoint_id, 0)
        assert isinstance(events, AsyncGenerator)
        await events.aclose()
        for service in services:
            await service.aclose()

    loop_thread.run(scenario(), 60)


@pytest.mark.slow
def test_a_burst_larger_than_any_buffer_waits_for_the_neighbour(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        services = [GossipService(first), GossipService(second, limits=ServiceLimits(queue=20_000))]
        topic = await services[0].join(TOPIC)
        other = await services[1].join(TOPIC, [first.addr()])
        await topic.joined(CALL_SECONDS)
        received: Counter[bytes] = Counter()
        reader = asyncio.create_task(count_messages(other, received))
        highest = 0
        for i in range(4000):
            await topic.broadcast(i.to_bytes(2, "big") + bytes(4000))
            highest = max(highest, services[0]._links[second.endpoint_id].queued)
        await until(lambda: len(received) == 4000)
        assert set(received.values()) == {1}
        assert highest < 2 << 20
        for service in services:
            await service.aclose()
        await reader

    loop_thread.run(scenario(), 80)


@pytest.mark.slow
def test_nobody_there_is_a_timeout_that_says_so(make_node: Callable[[], Node], loop_thread: LoopThread) -> None:
    node = make_node()

    async def scenario() -> None:
        service = GossipService(node)
        topic = await service.join(TOPIC, [NOBODY])
        with pytest.raises(PeerTimeoutError, match="no neighbour"):
            await topic.joined(0.05)
        await service.aclose()
        with pytest.raises(NodeClosedError):
            await service.join(TOPIC)

    loop_thread.run(scenario(), 60)


def test_a_wrong_topic_id_and_a_second_join_are_refused_with_advice(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    node = make_node()

    async def scenario() -> None:
        service = GossipService(node)
        with pytest.raises(ConfigurationError, match="32 bytes"):
            await service.join(b"run-1")
        await service.join(TOPIC)
        with pytest.raises(ConfigurationError, match="add_peers"):
            await service.join(TOPIC)
        await service.aclose()

    loop_thread.run(scenario(), 60)


def test_closing_the_node_says_goodbye_to_the_neighbours(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        services = [GossipService(first), GossipService(second)]
        topic = await services[0].join(TOPIC)
        await services[1].join(TOPIC, [first.addr()])
        await topic.joined(CALL_SECONDS)
        await second.aclose()
        await until(lambda: topic.neighbors == ())
        # Gone for good: it said so.
        assert second.endpoint_id not in services[0].protocol.topics[TOPIC].membership.passive
        await services[0].aclose()

    loop_thread.run(scenario(), 60)
