"""A peer that we are connected to, and cannot dial on the old way, is dialled from another endpoint with our key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.node import dialling
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import PeerUnreachableError

pytestmark = pytest.mark.waiting

ALPN = b"distro-optim/test/0"
SECONDS = 30.0

MakeNode = Callable[[], Node]


class DeadWay:
    """An endpoint whose dials go nowhere, as iroh's do when it knows a way to the peer that is dead."""

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.dials = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.endpoint, name)

    async def connect(self, address: Any, alpn: bytes) -> Any:
        self.dials += 1
        await asyncio.Event().wait()


async def say_hello(connection: Connection) -> None:
    send, _ = await connection.accept_bi()
    await send.write(b"hello")
    await send.finish()
    await connection.closed()


async def heard(connection: Connection) -> bytes:
    send, recv = await connection.open_bi()
    await send.write(b"?")
    return await recv.read_to_end(100, timeout=SECONDS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "BESIDE_SECONDS", 0.01)


def kill_the_way(node: Node) -> DeadWay:
    way = node._endpoint = DeadWay(node._endpoint)
    return way


@pytest.mark.usefixtures("quick")
def test_a_peer_whose_old_way_is_dead_is_reached_from_another_port_which_serves_as_the_first_does(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    node, peer = make_node(), make_node()
    for one in (node, peer):
        one.accept(ALPN, say_hello)

    async def scenario() -> None:
        old = await node.connect(peer.addr(), ALPN)
        way = kill_the_way(node)
        new = await node.connect(peer.addr(), ALPN, timeout=SECONDS)
        assert way.dials == 1
        assert await heard(new) == b"hello"
        assert await heard(old) == b"hello"  # it was left as it was
        assert len(node._dialler.beside) == 1
        # The peer sees us at the other port, and finds us there.
        ports = {place.port for place in node.sockets()}
        places = {SocketAddr.parse(place) for taken in peer.connections() for place in taken.places()}
        (other,) = (place for place in places if place.port not in ports)
        back = await peer.connect(EndpointAddr(node.endpoint_id, (), (other,)), ALPN, timeout=SECONDS)
        assert await heard(back) == b"hello"

    loop_thread.run(scenario(), 2 * SECONDS)


def test_a_peer_that_does_not_answer_is_not_dialled_on_the_old_way_at_all(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    node, peer = make_node(), make_node()
    peer.accept(ALPN, say_hello)

    async def scenario() -> None:
        old = await node.connect(peer.addr(), ALPN)
        old.look = lambda now, *, at_ways=True: True  # type: ignore[method-assign]
        old._is_silent = True
        way = kill_the_way(node)
        assert await heard(await node.connect(peer.addr(), ALPN, timeout=SECONDS)) == b"hello"
        assert way.dials == 0

    loop_thread.run(scenario(), 2 * SECONDS)


@pytest.mark.usefixtures("quick")
def test_a_peer_that_we_are_not_connected_to_is_dialled_from_the_first_endpoint_alone(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    node, peer = make_node(), make_node()

    async def scenario() -> None:
        kill_the_way(node)
        with pytest.raises(PeerUnreachableError):
            await node.connect(peer.addr(), ALPN, timeout=0.2)
        assert len(node._dialler.beside) == 0

    loop_thread.run(scenario(), 2 * SECONDS)


@pytest.mark.usefixtures("quick")
def test_an_answer_that_is_no_is_an_answer(make_node: MakeNode, loop_thread: LoopThread) -> None:
    node, peer = make_node(), make_node()
    peer.accept(ALPN, say_hello)

    async def scenario() -> None:
        await node.connect(peer.addr(), ALPN)
        with pytest.raises(PeerUnreachableError, match="error 120"):
            await node.connect(peer.addr(), b"distro-optim/nothing/0", timeout=SECONDS)

    loop_thread.run(scenario(), 2 * SECONDS)


@pytest.mark.usefixtures("quick")
def test_a_dial_from_two_endpoints_in_vain_leaves_nothing_behind(make_node: MakeNode, loop_thread: LoopThread) -> None:
    node, peer = make_node(), make_node()
    peer.accept(ALPN, say_hello)

    async def scenario() -> None:
        old = await node.connect(peer.addr(), ALPN)
        kill_the_way(node)
        open_beside = node._dialler.beside._open_one

        async def dead_too() -> Any:
            return DeadWay(await open_beside())

        node._dialler.beside._open_one = dead_too
        for _ in range(3):
            with pytest.raises(PeerUnreachableError, match="did not answer within"):
                await node.connect(peer.addr(), ALPN, timeout=0.3)
        assert node.connections() == [old]
        assert len(node._dialler.beside) == 1
        dials = ("Dialler._dial_beside", "_dial_from")
        assert not [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ in dials]  # type: ignore[union-attr]

    loop_thread.run(scenario(), 2 * SECONDS)
