"""Peers meet through a relay server, and turn to it when the direct way between them is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientSession
from typing_extensions import override

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.node import dialling
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import PeerUnreachableError
from distro_optim.testing.relay import RelayServer

from .test_dialling_beside_a_dead_way import ALPN, SECONDS, DeadWay, heard, say_hello

pytestmark = pytest.mark.waiting


class DeadUntilClosed(DeadWay):
    """Dials go nowhere as long as a connection to the peer is open, as iroh's do when it knows a way that is dead."""

    def __init__(self, endpoint: Any, old: Connection) -> None:
        super().__init__(endpoint)
        self.old = old

    @override
    async def connect(self, address: Any, alpn: bytes) -> Any:
        self.dials += 1
        if not self.old.is_closed:
            await asyncio.Event().wait()
        return await self.endpoint.connect(address, alpn)


def kill_the_way(node: Node, old: Connection) -> DeadUntilClosed:
    """From the first endpoint until the connection is closed, and from others for good."""
    way = DeadUntilClosed(node._endpoint, old)
    node._endpoint = old.endpoint = way

    async def nowhere() -> Any:
        return DeadWay(way.endpoint)

    node._dialler.beside._open_one = nowhere
    return way


def falls_silent(connection: Connection) -> None:
    """Whatever the counters say."""
    connection.look = lambda now, *, at_ways=True: connection._is_silent  # type: ignore[method-assign]
    connection._is_silent = True
    now = asyncio.get_running_loop().time()
    connection.opened = now - 20.0
    connection._silence._since = now - 5.0
    connection._received = (0, now - 10.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "GIVE_UP_SECONDS", 0.01)


@pytest.mark.slow(7)
def test_two_endpoints_that_know_nothing_of_each_other_but_the_relay_server_meet() -> None:
    async def scenario() -> None:
        async with RelayServer() as relay:
            node, peer = (Node(relay=relay.url, discovery=False, bind_addr="127.0.0.1:0") for _ in range(2))
            for one in (node, peer):
                one.accept(ALPN, say_hello)
                await asyncio.wait_for(one.online(), SECONDS)
            assert relay.clients == {node.endpoint_id, peer.endpoint_id}
            assert peer.addr().relays == (relay.url,)
            connection = await node.connect(EndpointAddr(peer.endpoint_id, (relay.url,), ()), ALPN, timeout=SECONDS)
            assert await heard(connection) == b"hello"
            assert relay.relayed[node.endpoint_id] > 0
            assert relay.relayed[peer.endpoint_id] > 0
            for one in (node, peer):
                await one.aclose()

    asyncio.run(scenario())


def test_who_does_not_have_the_key_is_turned_away() -> None:
    async def scenario() -> None:
        async with (
            RelayServer() as relay,
            ClientSession() as session,
            session.ws_connect(f"{relay.url}relay", protocols=("iroh-relay-v1",)) as socket,
        ):
            challenge = await socket.receive_bytes()
            assert (challenge[0], len(challenge)) == (0, 17)
            await socket.send_bytes(b"\x01" + bytes(32) + b"\x40" + bytes(64))
            assert (await socket.receive_bytes())[0] == 3
            assert relay.clients == set()

    asyncio.run(scenario())


@pytest.mark.slow(7)
@pytest.mark.usefixtures("quick")
def test_a_way_that_is_dead_is_given_up_for_a_relay_server_and_not_without_one() -> None:
    async def scenario() -> None:
        async with RelayServer() as relay:
            options: dict[str, Any] = {"relay": relay.url, "discovery": False, "bind_addr": "127.0.0.1:0"}
            node, peer = Node(**options), Node(**options)
            peer.accept(ALPN, say_hello)
            for one in (node, peer):
                await asyncio.wait_for(one.online(), SECONDS)
            old = await node.connect(peer.addr(), ALPN, timeout=SECONDS)
            kill_the_way(node, old)
            falls_silent(old)
            with pytest.raises(PeerUnreachableError):  # without one nothing is gained by it
                await node.connect(EndpointAddr(peer.endpoint_id, (), peer.addr().direct), ALPN, timeout=0.3)
            assert not old.is_closed
            new = await node.connect(peer.addr(), ALPN, timeout=SECONDS)
            assert await heard(new) == b"hello"
            assert old.is_closed
            for one in (node, peer):
                await one.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("keeps", ["it is a coordinator's", "something was heard", "it is younger", "it answers"])
def test_a_way_is_not_given_up_if_there_is_a_reason_to_keep_it(
    keeps: str, make_node: Callable[..., Node], loop_thread: LoopThread
) -> None:
    node, peer = make_node(), make_node()
    peer.accept(ALPN, say_hello)

    async def scenario() -> None:
        old, other = [await node.connect(peer.addr(), ALPN, timeout=SECONDS) for _ in range(2)]
        for connection in (old, other):
            falls_silent(connection)
        now = asyncio.get_running_loop().time()
        match keeps:
            case "it is a coordinator's":
                other.is_patient = True
            case "something was heard":
                other._is_silent, other._received = False, (1, now)
            case "it is younger":
                other._is_silent, other.opened = False, now
            case "it answers":
                old._is_silent = other._is_silent = False
        assert not node._dialler.give_up_old_way(peer.endpoint_id)  # before the watch has its next look
        assert not old.is_closed
        assert not other.is_closed

    loop_thread.run(scenario(), 2 * SECONDS)
