"""A swarm of our nodes and nodes of iroh-gossip 0.97 (bound by the wheel ``aster-rpc``), on loopback."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.net import GossipService
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import ConfigurationError
from gossip.live import CALL_SECONDS, RUN_SECONDS, count_messages, until

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


rust: Any = pytest.importorskip("aster._aster", reason="the Rust peer is in the wheel aster-rpc==0.1.2")

EACH_SIDE = 4
MESSAGES_FROM_EACH = 50
#: Any protocol that both sides serve: a connection over it tells Rust where we are.
INTRODUCTION = b"test/introduction"


class RustNode:
    """One node of iroh-gossip 0.97 in one topic, and what it has received."""

    def __init__(self, node: Any) -> None:
        self.node = node
        info = node.node_addr_info()
        self.id = bytes.fromhex(info.endpoint_id)
        self.addr = EndpointAddr(self.id, (), tuple(SocketAddr.parse(text) for text in info.direct_addresses))
        self.received: Counter[bytes] = Counter()
        self.topic: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def introduce(self, node: Node) -> None:
        """Lets this node know where ``node`` is."""
        there = rust.NodeAddr(node.endpoint_id.hex(), direct_addresses=[str(address) for address in node.addr().direct])
        await asyncio.wait_for(rust.net_client(self.node).connect_node_addr(there, INTRODUCTION), CALL_SECONDS)

    async def join(self, topic: bytes, bootstrap: list[bytes]) -> None:
        subscribe = rust.gossip_client(self.node).subscribe(topic, [peer.hex() for peer in bootstrap])
        self.topic = await asyncio.wait_for(subscribe, CALL_SECONDS)
        self._reader = asyncio.create_task(self._read())

    async def broadcast(self, content: bytes) -> None:
        await self.topic.broadcast(content)

    async def _read(self) -> None:
        while True:
            kind, data = await self.topic.recv()
            if kind == "received":
                self.received[bytes(data)] += 1

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        self.topic = None
        await asyncio.wait_for(self.node.shutdown(), CALL_SECONDS)


@asynccontextmanager
async def rust_nodes(count: int) -> AsyncIterator[list[RustNode]]:
    nodes = []
    try:
        for _ in range(count):
            config = rust.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
            nodes.append(RustNode(await rust.IrohNode.memory_with_alpns([], config)))
        yield nodes
    finally:
        for node in nodes:
            await node.close()


async def hold(connection: Connection) -> None:
    await connection.closed()


def test_a_mixed_swarm_delivers_every_message_of_every_node_once_to_all_others(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    ours = [make_node() for _ in range(EACH_SIDE)]
    for node in ours:
        node.accept(INTRODUCTION, hold)
    topic_id = os.urandom(32)

    async def scenario() -> list[Counter[bytes]]:
        services = [GossipService(node) for node in ours]
        async with rust_nodes(EACH_SIDE) as theirs:
            # The first of ours waits; each Rust node joins through two of ours, each further one of ours through
            # a Rust node and one of ours.
            topics = [await services[0].join(topic_id)]
            for i, other in enumerate(theirs):
                through = ours[max(i - 1, 0) : i + 1]
                for node in through:
                    await other.introduce(node)
                await other.join(topic_id, [node.endpoint_id for node in through])
                if i + 1 < EACH_SIDE:
                    topics.append(await services[i + 1].join(topic_id, [other.addr, ours[i].addr()]))
                    await topics[-1].joined(CALL_SECONDS)
            counts: list[Counter[bytes]] = [Counter() for _ in topics]
            readers = [
                asyncio.create_task(count_messages(topic, received))
                for topic, received in zip(topics, counts, strict=True)
            ]

            for i in range(MESSAGES_FROM_EACH):
                for k in range(EACH_SIDE):
                    await topics[k].broadcast(b"ours %d %d" % (k, i))
                    await theirs[k].broadcast(b"theirs %d %d" % (k, i))
                await asyncio.sleep(0.01)

            others = 2 * EACH_SIDE - 1
            everybody = [*counts, *(node.received for node in theirs)]
            await until(lambda: all(len(received) >= others * MESSAGES_FROM_EACH for received in everybody))
            for service in services:
                assert service.stats.offenders == 0
                await service.aclose()
            await asyncio.gather(*readers)
            return everybody

    everybody = loop_thread.run(scenario(), RUN_SECONDS + 60)

    everything = {
        b"%s %d %d" % (side, k, i)
        for side in (b"ours", b"theirs")
        for k in range(EACH_SIDE)
        for i in range(MESSAGES_FROM_EACH)
    }
    assert MESSAGES_FROM_EACH * EACH_SIDE == 200
    for position, received in enumerate(everybody):
        side = b"ours" if position < EACH_SIDE else b"theirs"
        own = {b"%s %d %d" % (side, position % EACH_SIDE, i) for i in range(MESSAGES_FROM_EACH)}
        assert set(received) == everything - own
        assert set(received.values()) == {1}


def test_the_largest_message_passes_both_ways_and_a_longer_one_is_refused_before_it_is_sent(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    node = make_node()
    node.accept(INTRODUCTION, hold)

    async def scenario() -> None:
        service = GossipService(node)
        size = service.config.max_content_size
        assert size == 4055
        async with rust_nodes(1) as (other,):
            topic = await service.join(bytes(32))
            await other.introduce(node)
            await other.join(bytes(32), [node.endpoint_id])
            await topic.joined(CALL_SECONDS)

            with pytest.raises(ConfigurationError, match="blob"):
                await topic.broadcast(bytes(size + 1))
            await topic.broadcast(b"o" * size)
            await until(lambda: other.received[b"o" * size] == 1)
            await other.broadcast(b"t" * (size + 2))
            async with asyncio.timeout(CALL_SECONDS):
                async for message in topic:
                    assert message.content == b"t" * (size + 2)
                    break
            await service.aclose()

    loop_thread.run(scenario(), 90)


def test_a_rust_node_that_ends_is_noticed_and_the_others_go_on(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    ours = [make_node() for _ in range(2)]

    async def scenario() -> None:
        for node in ours:
            node.accept(INTRODUCTION, hold)
        services = [GossipService(node) for node in ours]
        topics = [await services[0].join(bytes(32))]
        topics.append(await services[1].join(bytes(32), [ours[0].addr()]))
        received: Counter[bytes] = Counter()
        reader = asyncio.create_task(count_messages(topics[1], received))
        async with rust_nodes(1) as (other,):
            await other.introduce(ours[0])
            await other.join(bytes(32), [ours[0].endpoint_id])
            await until(lambda: other.id in topics[0].neighbors)
        await until(lambda: other.id not in topics[0].neighbors and other.id not in topics[1].neighbors)
        await topics[0].broadcast(b"still here")
        await until(lambda: received[b"still here"] == 1)
        for service in services:
            await service.aclose()
        await reader

    loop_thread.run(scenario(), 90)
