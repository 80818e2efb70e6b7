"""Peers that rush, hoard, babble or sleep cost themselves a connection, and nobody else anything."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node, NodeLimits
from distro_optim.comm.iroh.pool import ConnectionPool
from distro_optim.errors import ConfigurationError, ExchangeError, LimitExceededError, PeerTimeoutError

pytestmark = pytest.mark.waiting


ALPN = b"distro-optim/test/0"
SECONDS = 30.0
MakeNode = Callable[..., Node]


async def read_and_answer(connection: Connection) -> None:
    """Takes requests of at most a kilobyte, and gives anybody a second to make one."""
    while True:
        send, recv = await connection.accept_bi()
        await recv.read_to_end(1000, timeout=1.0)
        await send.write(b"answer")
        await send.finish()


async def served(node: Node, server: Node) -> bool:
    connection = await node.connect(server.endpoint_id, ALPN)
    send, recv = await connection.open_bi()
    await send.finish()
    return await recv.read_to_end(100, timeout=SECONDS) == b"answer"


def test_a_rush_of_dials_beyond_the_limits_is_served_in_the_end(make_node: MakeNode) -> None:
    server = make_node(limits=NodeLimits(handshakes=2))
    server.accept(ALPN, read_and_answer)
    clients = [make_node() for _ in range(8)]

    async def scenario() -> None:
        pools = [ConnectionPool(client, policy=BackoffPolicy(first=0.01, longest=0.1)) for client in clients]
        dials = [pool.connect(server.endpoint_id, ALPN, attempts=50) for pool in pools]
        connections = await asyncio.gather(*dials)
        assert len({connection.remote_id for connection in connections}) == 1

    server.submit(scenario()).result(SECONDS)


def test_a_full_node_refuses_newcomers_until_somebody_leaves(make_node: MakeNode) -> None:
    server, first, second = make_node(limits=NodeLimits(connections=1)), make_node(), make_node()
    server.accept(ALPN, read_and_answer)

    async def scenario() -> None:
        assert await served(first, server)
        with pytest.raises(ExchangeError):
            await second.connect(server.endpoint_id, ALPN, timeout=2.0)
        first.connections()[0].close()
        async with asyncio.timeout(SECONDS):
            while server.connections():
                await asyncio.sleep(0.005)
        assert await served(second, server)

    server.submit(scenario()).result(SECONDS)


def test_ten_megabytes_of_babble_are_not_kept(make_node: MakeNode) -> None:
    server, babbler, other = make_node(), make_node(), make_node()
    kept: list[int] = []

    async def measure(connection: Connection) -> None:
        _, recv = await connection.accept_bi()
        with pytest.raises(LimitExceededError):
            await recv.read_to_end(1000, timeout=SECONDS)
        kept.append(len(recv._buffer))
        raise LimitExceededError("too long")

    async def scenario() -> None:
        server.accept(ALPN, measure)
        connection = await babbler.connect(server.endpoint_id, ALPN)
        send, _ = await connection.open_bi()

        async def babble() -> None:
            for _ in range(160):
                await send.write(b"\xff" * 65536, timeout=SECONDS)

        with pytest.raises(ExchangeError):
            await babble()
        await connection.closed()
        assert connection.close_code == 2
        assert kept == [1001]
        server.refuse(ALPN)
        server.accept(ALPN, read_and_answer)
        assert await served(other, server)

    server.submit(scenario()).result(SECONDS)


def test_who_opens_ten_thousand_streams_waits_for_its_turn(make_node: MakeNode) -> None:
    server, hoarder, other = make_node(), make_node(), make_node()

    async def one_at_a_time(connection: Connection) -> None:
        connection.limit_streams(uni=0, bi=4)
        await read_and_answer(connection)

    async def scenario() -> None:
        server.accept(ALPN, one_at_a_time)
        connection = await hoarder.connect(server.endpoint_id, ALPN)
        opened = []

        async def hoard() -> None:
            for _ in range(10_000):
                send, recv = await connection.open_bi(timeout=0.5)
                await send.write(b"x")
                opened.append((send, recv))

        with pytest.raises(PeerTimeoutError):
            await hoard()
        # The transport's own number of streams holds until the limit is told.
        assert len(opened) <= 104
        assert await served(other, server)

    server.submit(scenario()).result(SECONDS)


@pytest.mark.slow
def test_who_does_not_finish_its_request_is_cut_off(make_node: MakeNode) -> None:
    server, sleeper = make_node(), make_node()
    server.accept(ALPN, read_and_answer)

    async def scenario() -> None:
        connection = await sleeper.connect(server.endpoint_id, ALPN)
        send, _ = await connection.open_bi()
        await send.write(b"I will go on in a")
        async with asyncio.timeout(SECONDS):
            await connection.closed()

    server.submit(scenario()).result(SECONDS)


def test_who_never_reads_blocks_only_its_own_stream(make_node: MakeNode) -> None:
    server, sleeper, other = make_node(), make_node(), make_node()
    stuck: list[Exception] = []

    async def pour(connection: Connection) -> None:
        send, _ = await connection.accept_bi()
        try:
            while True:
                await send.write(bytes(1 << 20), timeout=0.3)
        except PeerTimeoutError as error:
            stuck.append(error)
            raise

    async def scenario() -> None:
        server.accept(ALPN, pour)
        connection = await sleeper.connect(server.endpoint_id, ALPN)
        send, _ = await connection.open_bi()
        await send.write(b"more, more")
        async with asyncio.timeout(SECONDS):
            await connection.closed()
        assert len(stuck) == 1
        server.refuse(ALPN)
        server.accept(ALPN, read_and_answer)
        assert await served(other, server)

    server.submit(scenario()).result(SECONDS)


def test_packets_that_are_no_quic_are_ignored(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    server.accept(ALPN, read_and_answer)
    target = server.addr().direct[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
        for size in range(0, 1400, 7):
            noise.sendto(bytes(size % 256 for _ in range(size)), (str(target.ip), target.port))
    assert client.submit(served(client, server)).result(SECONDS)


@pytest.mark.parametrize("name", ["connections", "connections_per_peer", "handshakes", "handshake_seconds"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        NodeLimits(**{name: 0})
