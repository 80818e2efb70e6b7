"""Nodes find, serve, refuse and leave each other."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest

import warm_python
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh import ffi
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node, NodeLimits
from distro_optim.comm.iroh.node import dialling
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.tickets import EndpointTicket
from distro_optim.errors import (
    ConfigurationError,
    ConnectionLostError,
    LimitExceededError,
    NodeClosedError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
    StreamResetError,
    StreamStoppedError,
    TruncatedError,
)

pytestmark = pytest.mark.waiting


ALPN = b"distro-optim/test/0"
SECONDS = 20.0

MakeNode = Callable[..., Node]


async def echo(connection: Connection) -> None:
    """Sends every two-way stream back to where it came from."""
    while True:
        send, recv = await connection.accept_bi()
        await send.write(await recv.read_to_end(1 << 20))
        await send.finish()


async def say(node: Node, peer: bytes, words: bytes) -> bytes:
    connection = await node.connect(peer, ALPN)
    send, recv = await connection.open_bi()
    await send.write(words)
    await send.finish()
    return await recv.read_to_end(1 << 20, timeout=SECONDS)


def thread_states() -> int:
    """Threads that this interpreter holds something for, whoever has started them."""
    api = ctypes.pythonapi
    for function in (api.PyInterpreterState_Get, api.PyInterpreterState_ThreadHead, api.PyThreadState_Next):
        function.restype = ctypes.c_void_p
    state, count = api.PyInterpreterState_ThreadHead(ctypes.c_void_p(api.PyInterpreterState_Get())), 0
    while state:
        state, count = api.PyThreadState_Next(ctypes.c_void_p(state)), count + 1
    return count


def test_the_thread_of_the_transport_is_not_set_up_anew_for_each_answer(make_node: MakeNode) -> None:
    first, second = make_node(), make_node()
    first.accept(ALPN, echo)
    assert second.submit(say(second, first.endpoint_id, b"hello")).result(SECONDS) == b"hello"
    assert thread_states() > threading.active_count()


def test_what_is_written_comes_back(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    server.accept(ALPN, echo)
    assert client.submit(say(client, server.endpoint_id, b"hello" * 1000)).result(SECONDS) == b"hello" * 1000


def test_the_handshake_proves_both_identities(make_node: MakeNode) -> None:
    server, client = make_node(secret_key=bytes(31) + b"\1"), make_node()
    seen: asyncio.Queue[Connection] = asyncio.Queue()

    async def keep(connection: Connection) -> None:
        await seen.put(connection)
        await connection.closed()

    async def scenario() -> None:
        server.accept(ALPN, keep)
        dialled = await client.connect(server.endpoint_id, ALPN)
        accepted = await seen.get()
        assert dialled.remote_id == server.endpoint_id == SecretKey(bytes(31) + b"\1").public
        assert accepted.remote_id == client.endpoint_id
        assert (dialled.dialled, accepted.dialled) == (True, False)
        assert accepted.alpn == ALPN
        dialled.close(7, b"enough")
        assert "enough" in await accepted.closed()

    client.submit(scenario()).result(SECONDS)


def test_the_callback_direction_needs_no_address(make_node: MakeNode, loop_thread: object) -> None:
    server, client = make_node(), make_node()
    server.addresses.forget(client.endpoint_id)
    server.accept(ALPN, echo)
    client.accept(ALPN, echo)

    async def scenario() -> None:
        assert await say(client, server.endpoint_id, b"there") == b"there"
        assert await say(server, client.endpoint_id, b"back") == b"back"

    client.submit(scenario()).result(SECONDS)


def test_an_unknown_address_fails_at_once_and_says_so(make_node: MakeNode) -> None:
    client = make_node()
    stranger = SecretKey(b"\5" * 32).public
    with pytest.raises(PeerUnreachableError, match="no known address"):
        client.submit(client.connect(stranger, ALPN)).result(SECONDS)


@pytest.mark.slow
def test_a_dead_address_fails_after_the_timeout(make_node: MakeNode) -> None:
    client = make_node()
    nobody = EndpointAddr(SecretKey(b"\5" * 32).public, direct=(SocketAddr.parse("127.0.0.1:9"),))
    with pytest.raises(PeerUnreachableError, match=r"127\.0\.0\.1:9"):
        client.submit(client.connect(nobody, ALPN, timeout=0.2)).result(SECONDS)


@pytest.mark.slow
def test_a_relay_url_that_cannot_be_read_hides_no_other_address(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    server.accept(ALPN, echo)
    client.addresses.add(EndpointAddr(server.endpoint_id, ("https://", "https://1.2.3.999/", "https://a%zz/")))
    assert client.submit(say(client, server.endpoint_id, b"hello")).result(SECONDS) == b"hello"


@pytest.mark.slow
def test_each_relay_server_of_a_peer_has_its_turn() -> None:
    # The one that it was at before may be known for longer than the one that it is at now.
    relays = ("http://10.0.0.9:3340/", "https://1.2.3.999/", "https://relay.example/")
    known = EndpointAddr(SecretKey(b"\5" * 32).public, relays)
    assert {dialling._raw_addr(known).relay_url() for _ in range(100)} == {relays[0], relays[2]}


def test_external_addresses_are_told_to_others(make_node: MakeNode) -> None:
    node = make_node(external_addr=["203.0.113.7:4433", "[2001:db8::7]:4433"], bind_addr="127.0.0.1:0")
    told = EndpointTicket.parse(str(EndpointTicket(node.addr()))).addr.direct
    assert {SocketAddr.parse("203.0.113.7:4433"), SocketAddr.parse("[2001:db8::7]:4433")} < set(told)


def test_an_external_address_of_a_port_taken_at_random_is_warned_of(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    make_node(external_addr="203.0.113.7:4433")
    assert "--bind-p2p-port" in caplog.text
    caplog.clear()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    make_node(external_addr="203.0.113.7:4433", bind_addr=address)
    assert not caplog.text


@pytest.mark.slow
def test_a_node_takes_relay_servers_without_tls(make_node: MakeNode) -> None:
    # Nobody listens there: the node works nevertheless, and hears of it only when it asks whether it is online.
    server, client = make_node(relay="http://127.0.0.1:9"), make_node(relay=["http://127.0.0.1:9", "https://[::1]:9/"])
    server.accept(ALPN, echo)
    assert client.submit(say(client, server.endpoint_id, b"hello")).result(SECONDS) == b"hello"


def test_a_node_does_not_dial_itself(make_node: MakeNode) -> None:
    node = make_node()
    with pytest.raises(PeerUnreachableError, match="itself"):
        node.submit(node.connect(node.endpoint_id, ALPN)).result(SECONDS)


def test_a_protocol_that_is_not_served_cannot_be_dialled(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    server.accept(ALPN, echo)
    with pytest.raises(PeerUnreachableError):
        client.submit(client.connect(server.endpoint_id, b"other/0", timeout=2.0)).result(SECONDS)
    server.accept(b"other/0", echo)
    client.submit(client.connect(server.endpoint_id, b"other/0")).result(SECONDS)


def test_who_is_not_on_the_allow_list_is_turned_away_with_the_code_of_psyche(make_node: MakeNode) -> None:
    server, friend, stranger = make_node(), make_node(), make_node()
    server.set_allowed([friend.endpoint_id])
    server.accept(ALPN, echo)

    async def scenario() -> None:
        assert await say(friend, server.endpoint_id, b"hello") == b"hello"
        connection = await stranger.connect(server.endpoint_id, ALPN)
        assert "not in allowlist" in await asyncio.wait_for(connection.closed(), SECONDS)
        assert connection.close_code == 1
        with pytest.raises(PeerRefusedError):
            await server.connect(stranger.endpoint_id, ALPN)

    server.submit(scenario()).result(SECONDS)


def test_a_peer_taken_off_the_allow_list_is_cut_off(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    server.accept(ALPN, echo)

    async def scenario() -> None:
        connection = await client.connect(server.endpoint_id, ALPN)
        send, recv = await connection.open_bi()
        await send.write(b"x")
        await send.finish()
        await recv.read_to_end(10)
        server.set_allowed([])
        assert "not in allowlist" in await asyncio.wait_for(connection.closed(), SECONDS)
        assert server.connections() == []

    server.submit(scenario()).result(SECONDS)


def test_one_peer_cannot_hold_more_connections_than_the_limit(make_node: MakeNode) -> None:
    server, client, other = make_node(limits=NodeLimits(connections_per_peer=2)), make_node(), make_node()
    server.accept(ALPN, echo)

    async def scenario() -> None:
        kept = [await client.connect(server.endpoint_id, ALPN) for _ in range(2)]
        for _ in range(2):  # a word on each proves that the server has taken both
            for connection in kept:
                send, recv = await connection.open_bi()
                await send.finish()
                assert await recv.read_to_end(1) == b""
        third = await client.connect(server.endpoint_id, ALPN)
        assert "too many" in await asyncio.wait_for(third.closed(), SECONDS)
        assert await say(other, server.endpoint_id, b"hello") == b"hello"
        assert not any(connection.is_closed for connection in kept)

    server.submit(scenario()).result(SECONDS)


def test_a_handler_that_fails_costs_its_peer_one_connection(make_node: MakeNode, caplog: object) -> None:
    server, client = make_node(), make_node()

    async def broken(connection: Connection) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        server.accept(b"broken/0", broken)
        server.accept(ALPN, echo)
        connection = await client.connect(server.endpoint_id, b"broken/0")
        await asyncio.wait_for(connection.closed(), SECONDS)
        assert connection.close_code == 2
        assert await say(client, server.endpoint_id, b"still here") == b"still here"

    server.submit(scenario()).result(SECONDS)


def test_reset_and_stop_carry_their_codes(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()

    async def reset_and_stop(connection: Connection) -> None:
        send, recv = await connection.accept_bi()
        await recv.read(1)
        await recv.stop(9)
        await send.reset(3)
        await connection.closed()

    async def scenario() -> None:
        server.accept(ALPN, reset_and_stop)
        connection = await client.connect(server.endpoint_id, ALPN)
        send, recv = await connection.open_bi()
        await send.write(b"x")
        with pytest.raises(StreamResetError) as reset:
            await recv.read(1, timeout=SECONDS)
        assert reset.value.code == 3
        assert await send.stopped(timeout=SECONDS) == 9
        with pytest.raises(StreamStoppedError) as stop:
            await send.write(b"y")
        assert stop.value.code == 9
        connection.close()

    server.submit(scenario()).result(SECONDS)


def test_reads_are_bounded_in_time_and_size_and_lose_nothing(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    more = asyncio.Event()

    async def drip(connection: Connection) -> None:
        send = await connection.open_uni()
        await send.write(b"12345")
        await more.wait()
        await send.write(b"67890")
        await send.finish()
        await connection.closed()

    async def scenario() -> None:
        server.accept(ALPN, drip)
        connection = await client.connect(server.endpoint_id, ALPN)
        recv = await connection.accept_uni(timeout=SECONDS)
        with pytest.raises(PeerTimeoutError):
            await recv.read_exact(6, timeout=0.05)
        more.set()
        assert await recv.read_exact(6, timeout=SECONDS) == b"123456"
        with pytest.raises(LimitExceededError):
            await recv.read_to_end(3, timeout=SECONDS)
        with pytest.raises(TruncatedError):
            await recv.read_exact(5, timeout=SECONDS)
        assert await recv.read_exact(4) == b"7890"
        assert await recv.read() == b""
        connection.close()

    server.submit(scenario()).result(SECONDS)


def test_a_lost_connection_ends_every_wait(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()

    async def hold(connection: Connection) -> None:
        send, _ = await connection.accept_bi()
        await send.write(b"x")
        connection.close()

    async def scenario() -> None:
        server.accept(ALPN, hold)
        connection = await client.connect(server.endpoint_id, ALPN)
        send, recv = await connection.open_bi()
        await send.write(b"x")
        with pytest.raises(ConnectionLostError):
            await recv.read_to_end(10, timeout=SECONDS)
        with pytest.raises(ConnectionLostError):
            await connection.accept_uni(timeout=SECONDS)
        with pytest.raises(ConnectionLostError):
            await connection.open_bi(timeout=SECONDS)
        assert connection.is_closed

    server.submit(scenario()).result(SECONDS)


def test_statistics_tell_the_path_and_count_bytes(make_node: MakeNode) -> None:
    server, client = make_node(), make_node()
    server.accept(ALPN, echo)

    async def scenario() -> None:
        connection = await client.connect(server.endpoint_id, ALPN)
        send, recv = await connection.open_bi()
        await send.write(bytes(100_000))
        await send.finish()
        assert len(await recv.read_to_end(1 << 20, timeout=SECONDS)) == 100_000
        stats = connection.stats()
        assert stats.way.path == "direct"
        assert SocketAddr.parse(stats.way.remote_addr) in server.addr().direct
        assert stats.way.rtt is not None
        assert 0 <= stats.way.rtt < 5
        assert stats.bytes_sent > 100_000
        assert stats.bytes_received > 100_000
        connection.close()
        assert connection.stats().way.path == "none"

    server.submit(scenario()).result(SECONDS)


def test_a_closed_node_refuses_work_and_closes_twice(make_node: MakeNode) -> None:
    node = make_node(loop=None)
    node.close()
    node.close()
    with pytest.raises(NodeClosedError):
        node.submit(node.connect(bytes(32), ALPN))
    with pytest.raises(NodeClosedError):
        node.start()


def test_a_node_that_was_never_used_closes(make_node: MakeNode) -> None:
    Node(bind_addr="127.0.0.1:0", relay="none").close()


def test_waiting_on_the_own_thread_is_refused(make_node: MakeNode) -> None:
    node = make_node()

    async def wait() -> None:
        with pytest.raises(RuntimeError, match="await"):
            node.start()

    node.submit(wait()).result(SECONDS)


def test_a_loopback_node_listens_on_loopback_only(make_node: MakeNode) -> None:
    assert {str(address.ip) for address in make_node().addr().direct} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"secret_key": b"short"}, "secret_key"),
        ({"relay": "somewhere"}, "relay"),
        ({"discovery": "somewhere"}, "discovery"),
        ({"external_addr": "203.0.113.7"}, "external_addr"),
        ({"bind_addr": "localhost"}, "address"),
        ({"bind_addr": "[::1]:0"}, "bind_addr"),
        ({"allowed": [b"short"]}, "allowed"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Node(**options)  # type: ignore[arg-type]
    assert error.value.name == name


def test_a_protocol_is_served_once(make_node: MakeNode) -> None:
    node = make_node()
    node.accept(ALPN, echo)
    with pytest.raises(ConfigurationError, match="already"):
        node.accept(ALPN, echo)


ENDING = """
    import asyncio, signal, sys, time
    from distro_optim.comm.iroh.endpoint import Node
    loopback = dict(bind_addr="127.0.0.1:0", relay="none")
    async def hold(connection):
        await connection.accept_uni()
    a, b = Node(**loopback).start(), Node(**loopback).start()
    b.accept(b"x", hold)
    a.addresses.add(b.addr())
    connection = a.submit(a.connect(b.endpoint_id, b"x")).result(10)
    waiting = a.submit(connection.accept_uni())
    print("ready", flush=True)
    ENDING
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        pytest.param("sys.exit(3)", 3, id="exit"),
        pytest.param("raise ValueError", 1, id="exception"),
        pytest.param("waiting.result()", -signal.SIGINT, id="ctrl-c"),
    ],
)
def test_a_program_that_ends_while_its_nodes_are_open_is_gone(ending: str, code: int) -> None:
    process = warm_python.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(ENDING).replace("ENDING", ending)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if code == -signal.SIGINT:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode in (code, 130 if code == -signal.SIGINT else code)
    assert "never" not in errors
    assert "ignored" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True], ids=["accelerated", "stock"])
def test_large_and_small_writes_arrive_with_and_without_acceleration(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, stock: bool
) -> None:
    ffi.restore()
    if stock:
        monkeypatch.setenv(ffi.STOCK_VARIABLE, "1")
    try:
        assert ffi.accelerate().byte_copy is not stock
        assert ffi.accelerate().ready_calls is not stock
        server, client = make_node(), make_node()
        server.accept(ALPN, echo)
        for size in (0, 1, 65_537, 1 << 20):
            words = os.urandom(size)
            assert client.submit(say(client, server.endpoint_id, words)).result(SECONDS) == words
    finally:
        ffi.restore()
        monkeypatch.delenv(ffi.STOCK_VARIABLE, raising=False)
        ffi.accelerate()
