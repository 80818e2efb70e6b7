"""A Rust peer of the versions Psyche pins takes part in a swarm: it hears, fetches, announces and provides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any, TypeVar

import pytest

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.swarm import IrohSwarm, topic_of_run
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey, SignedMessage
from distro_optim.comm.tickets import BlobTicket

rust: Any = pytest.importorskip("aster._aster", reason="the Rust peer: pip install aster-rpc==0.1.2")

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

T = TypeVar("T")

TOPIC = topic_of_run("mixed")
# Any protocol that both sides serve: a connection over it tells Rust where we are.
INTRODUCTION = b"distro-optim/introduction/0"
SECONDS = 30.0
BLOB = bytes(number % 251 for number in range(300_000))


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-network")
    yield thread
    thread.stop()


async def hold(connection: Connection) -> None:
    await connection.closed()


def within(awaitable: Awaitable[T]) -> Awaitable[T]:
    return asyncio.wait_for(awaitable, SECONDS)


async def hear(topic: Any) -> bytes:
    """The next message that the Rust peer receives."""
    while True:
        kind, data = await topic.recv()
        if kind == "received":
            return bytes(data)


def test_a_rust_peer_hears_fetches_announces_and_provides(loop_thread: LoopThread) -> None:
    async def scenario() -> None:
        node = Node(bind_addr="127.0.0.1:0", relay="none", loop=loop_thread)
        node.accept(INTRODUCTION, hold)
        swarm = IrohSwarm(node, TOPIC)
        await swarm.join([])

        config = rust.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
        peer = await rust.IrohNode.memory_with_alpns([], config)
        key = SecretKey(bytes(peer.export_secret_key()))
        direct = tuple(SocketAddr.parse(text) for text in peer.node_addr_info().direct_addresses)
        address = EndpointAddr(key.public, (), direct)
        swarm.set_allowed([key.public])

        ours = rust.NodeAddr(node.endpoint_id.hex(), None, [str(place) for place in node.addr().direct])
        introduced = await within(rust.net_client(peer).connect_node_addr(ours, INTRODUCTION))
        topic = await within(rust.gossip_client(peer).subscribe(TOPIC, [node.endpoint_id.hex()]))
        blobs = rust.blobs_client(peer)
        await swarm.joined(SECONDS)

        ticket = await swarm.publish(BLOB, "result_1")
        await swarm.announce(postcard.encode(ticket))
        heard = SignedMessage.open(await within(hear(topic)))
        assert heard.sender == swarm.peer_id
        told = postcard.decode(BlobTicket, heard.data)
        assert bytes(await within(blobs.download_blob(str(told)))) == BLOB

        root = bytes.fromhex(await blobs.add_bytes(BLOB[::-1]))
        theirs = postcard.encode(BlobTicket.raw(address, root))
        await topic.broadcast(SignedMessage.seal(key, theirs))
        announcement = await within(anext(swarm.announcements()))
        assert announcement.sender == key.public
        fetched = await within(swarm.fetch(postcard.decode(BlobTicket, announcement.data), max_size=len(BLOB)))
        assert fetched == BLOB[::-1]

        (info,) = swarm.peers()
        assert info.id == key.public
        assert info.is_neighbor
        assert info.bytes_received > len(BLOB)
        introduced.close(0, b"")
        await node.aclose()
        await within(peer.shutdown())

    loop_thread.run(scenario(), 4 * SECONDS)
