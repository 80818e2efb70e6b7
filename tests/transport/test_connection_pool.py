"""Connections are shared, retried after failures, and closed when idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import pytest

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.pool import ConnectionPool
from distro_optim.errors import NodeClosedError, PeerRefusedError, PeerUnreachableError

pytestmark = pytest.mark.waiting


ALPN = b"distro-optim/test/0"
SECONDS = 20.0
# Waits of a millisecond keep the tests quick; the rule is the same.
QUICK = BackoffPolicy(first=0.001, longest=0.002)

MakeNode = Callable[..., Node]


class Server:
    """Counts the connections it is given."""

    def __init__(self, node: Node) -> None:
        self.connections: list[Connection] = []
        node.accept(ALPN, self.serve)

    async def serve(self, connection: Connection) -> None:
        self.connections.append(connection)
        while True:
            send, recv = await connection.accept_bi()
            await send.write(await recv.read_to_end(100))
            await send.finish()


async def ping(connection: Connection) -> None:
    send, recv = await connection.open_bi()
    await send.write(b"ping")
    await send.finish()
    assert await recv.read_to_end(100, timeout=SECONDS) == b"ping"


def test_all_who_ask_share_one_connection(make_node: MakeNode) -> None:
    node, peer = make_node(), make_node()
    server = Server(peer)

    async def scenario() -> None:
        pool = ConnectionPool(node)
        connections = await asyncio.gather(*(pool.connect(peer.endpoint_id, ALPN) for _ in range(5)))
        async with pool.lease(peer.endpoint_id, ALPN) as leased:
            await ping(leased)
        assert {*connections, leased} == {pool.get(peer.endpoint_id, ALPN)}
        assert len(server.connections) == 1

    node.submit(scenario()).result(SECONDS)


def test_a_closed_connection_is_replaced(make_node: MakeNode) -> None:
    node, peer = make_node(), make_node()
    server = Server(peer)

    async def scenario() -> None:
        pool = ConnectionPool(node)
        first = await pool.connect(peer.endpoint_id, ALPN)
        await ping(first)
        server.connections[0].close(1, b"go away")
        await first.closed()
        second = await pool.connect(peer.endpoint_id, ALPN)
        assert second is not first
        await ping(second)
        assert len(pool) == 1

    node.submit(scenario()).result(SECONDS)


def test_a_peer_that_failed_once_is_dialled_again(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node, peer = make_node(), make_node()
    Server(peer)
    real = node.connect
    failures: list[object] = []

    async def fail_at_first(*args: object, **options: object) -> Connection:
        if len(failures) < 2:
            failures.append(args)
            raise PeerUnreachableError("injected")
        return await real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(node, "connect", fail_at_first)

    async def scenario() -> None:
        pool = ConnectionPool(node, policy=QUICK, random=Random(1))
        await ping(await pool.connect(peer.endpoint_id, ALPN, attempts=3))
        assert len(failures) == 2

    node.submit(scenario()).result(SECONDS)


def test_after_the_last_attempt_the_reason_is_told_and_a_later_call_tries_anew(
    make_node: MakeNode,
) -> None:
    node, peer = make_node(), make_node()
    address = node.addresses.lookup(peer.endpoint_id, 0.0)
    node.addresses.forget(peer.endpoint_id)
    Server(peer)

    async def scenario() -> None:
        pool = ConnectionPool(node, policy=QUICK)
        with pytest.raises(PeerUnreachableError, match="no known address"):
            await pool.connect(peer.endpoint_id, ALPN, attempts=2)
        node.addresses.add(address)
        await ping(await pool.connect(peer.endpoint_id, ALPN, attempts=1))

    node.submit(scenario()).result(SECONDS)


def test_a_peer_off_the_allow_list_is_not_retried(make_node: MakeNode) -> None:
    node, peer = make_node(allowed=[]), make_node()

    async def scenario() -> None:
        pool = ConnectionPool(node, policy=BackoffPolicy(first=1000, longest=1000))
        with pytest.raises(PeerRefusedError):
            await pool.connect(peer.endpoint_id, ALPN)

    node.submit(scenario()).result(SECONDS)


def test_an_unused_connection_is_closed_and_a_leased_one_is_not(make_node: MakeNode) -> None:
    node, peer, other = make_node(), make_node(), make_node()
    Server(peer), Server(other)

    async def scenario() -> None:
        pool = ConnectionPool(node, idle_timeout=0.01)
        async with pool.lease(other.endpoint_id, ALPN) as busy:
            async with pool.lease(peer.endpoint_id, ALPN) as idle:
                await ping(idle)
            await asyncio.wait_for(idle.closed(), SECONDS)
            await ping(busy)
            assert pool.get(peer.endpoint_id, ALPN) is None
            assert pool.get(other.endpoint_id, ALPN) is busy

    node.submit(scenario()).result(SECONDS)


def test_one_who_gives_up_waiting_leaves_the_dial_to_the_others(make_node: MakeNode) -> None:
    node, peer = make_node(), make_node()
    Server(peer)

    async def scenario() -> None:
        pool = ConnectionPool(node)
        first = asyncio.ensure_future(pool.connect(peer.endpoint_id, ALPN))
        second = asyncio.ensure_future(pool.connect(peer.endpoint_id, ALPN))
        await asyncio.sleep(0)
        first.cancel()
        await ping(await second)

    node.submit(scenario()).result(SECONDS)


def test_a_closed_pool_gives_nothing(make_node: MakeNode) -> None:
    node, peer = make_node(), make_node()
    Server(peer)

    async def scenario() -> None:
        pool = ConnectionPool(node)
        connection = await pool.connect(peer.endpoint_id, ALPN)
        await pool.aclose()
        assert connection.is_closed
        with pytest.raises(NodeClosedError):
            await pool.connect(peer.endpoint_id, ALPN)

    node.submit(scenario()).result(SECONDS)
