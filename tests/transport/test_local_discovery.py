"""Nodes of one machine find each other by the files that Psyche's clients leave and read."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import warm_python
from distro_optim.comm.addresses import MAX_ADDRESSES, EndpointAddr, SocketAddr
from distro_optim.comm.iroh import local_discovery
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.local_discovery import (
    MAX_FILE_BYTES,
    LocalDiscovery,
    decode_local_file,
    encode_local_file,
    local_addresses,
)
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey
from distro_optim.errors import ConfigurationError, NodeClosedError, PeerUnreachableError, ProtocolError

pytestmark = pytest.mark.waiting

SECONDS = 20.0
ALPN = b"local-discovery/0"
PEER = SecretKey(b"\5" * 32).public
LOCAL: dict[str, Any] = {"relay": "none", "discovery": "local", "bind_addr": "127.0.0.1:0"}


def place(text: str) -> SocketAddr:
    return SocketAddr.parse(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(local_discovery, "FOLDER", tmp_path / "iroh_local_discovery")
    return local_discovery.FOLDER


@pytest.fixture
def other(folder: Path) -> Callable[[bytes | str], Path]:
    """Writes the file of another node."""
    folder.mkdir()

    def write(data: bytes | str) -> Path:
        path = folder / PEER.hex()
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


async def answer(connection: Connection) -> None:
    await connection.closed()


# -- the files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_what_psyches_clients_write() -> None:
    text = b'{"relay_urls":["https://relay.example/"],"direct_addresses":["127.0.0.1:40231"]}'
    address = EndpointAddr(PEER, ("https://relay.example/",), (place("127.0.0.1:40231"),))
    assert encode_local_file(address) == text
    assert decode_local_file(PEER, text) == address


def test_the_folder_is_psyches() -> None:
    if os.name == "posix":
        assert Path("/tmp/iroh_local_discovery") == local_discovery.FOLDER


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["https://a./", "http://b.:3340/", "https://c.example/"]), max_size=4),
    st.lists(st.builds(SocketAddr, st.ip_addresses(), st.integers(0, 0xFFFF)), max_size=8),
)
def test_what_a_file_says_survives_the_round_trip(relays: list[str], direct: list[SocketAddr]) -> None:
    address = EndpointAddr(PEER, tuple(relays), tuple(one for one in direct if one.is_dialable))
    assert decode_local_file(PEER, encode_local_file(address)) == address


@given(st.one_of(st.binary(max_size=200), st.from_type(type(None)).map(lambda _: b"[" * 5000)))
def test_arbitrary_bytes_raise_only_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_local_file(PEER, data)


@pytest.mark.parametrize(
    "found",
    [
        7,
        [],
        {},
        {"relay_urls": []},
        {"relay_urls": [], "direct_addresses": "127.0.0.1:1"},
        {"relay_urls": {}, "direct_addresses": []},
        {"relay_urls": [None], "direct_addresses": []},
        {"relay_urls": [], "direct_addresses": [["127.0.0.1", 1]]},
        {"relay_urls": [], "direct_addresses": ["localhost:1"]},
        {"relay_urls": [], "direct_addresses": ["127.0.0.1:99999"]},
        {"relay_urls": [], "direct_addresses": ["127.0.0.1:" + "1" * 5000]},
    ],
)
def test_another_shape_is_refused(found: object) -> None:
    with pytest.raises(ProtocolError):
        decode_local_file(PEER, json.dumps(found).encode())


def test_what_a_stranger_writes_is_bounded() -> None:
    many = [f"127.0.0.1:{port}" for port in range(1, 1000)]
    found = {"relay_urls": [f"https://{n}/" for n in range(100)], "direct_addresses": many, "more": 1}
    address = decode_local_file(PEER, json.dumps(found).encode())
    assert (len(address.relays), len(address.direct)) == (MAX_ADDRESSES, MAX_ADDRESSES)
    with pytest.raises(ProtocolError, match="more than"):
        decode_local_file(PEER, json.dumps({**found, "more": " " * MAX_FILE_BYTES}).encode())


def test_places_where_nobody_can_be_are_passed_over() -> None:
    found = {
        "relay_urls": ["ftp://relay.example/", "nonsense", "https://", "https://relay.example/"],
        "direct_addresses": ["0.0.0.0:1", "127.0.0.1:0", "224.0.0.1:5", "[fe80::1%eth0]:5", "127.0.0.1:5"],
    }
    address = decode_local_file(PEER, json.dumps(found).encode())
    assert address == EndpointAddr(PEER, ("https://relay.example/",), (place("127.0.0.1:5"),))


def test_a_node_on_all_interfaces_is_reached_through_loopback() -> None:
    sockets = map(place, ["0.0.0.0:4433", "[::]:4434", "192.0.2.1:5", "127.0.0.1:6"])
    assert local_addresses(sockets) == tuple(map(place, ["127.0.0.1:4433", "192.0.2.1:5", "127.0.0.1:6"]))


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["", "{", "[]", "{}", b"\xff", b"x" * (MAX_FILE_BYTES + 1)])
def test_a_file_that_cannot_be_used_says_nothing(
    other: Callable[[bytes | str], Path], data: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    other(data)
    with caplog.at_level(logging.WARNING):
        assert LocalDiscovery(bytes(32)).look_up(PEER) == EndpointAddr(PEER)
    assert "is not used" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="no links and pipes")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_read(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    path = folder / PEER.hex()
    if kind == "link":
        secret = folder.parent / "secret"
        secret.write_bytes(encode_local_file(EndpointAddr(PEER, direct=(place("127.0.0.1:5"),))))
        path.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(path)  # to which nobody ever writes
    else:
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert LocalDiscovery(bytes(32)).look_up(PEER).is_empty
    assert "is not used" in caplog.text


def test_nobody_who_is_unknown_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert LocalDiscovery(bytes(32)).look_up(PEER).is_empty
    assert not caplog.text


def test_a_link_in_our_place_is_replaced_not_followed(folder: Path) -> None:
    folder.mkdir()
    mine = folder.parent / "mine"
    mine.write_text("precious")
    (folder / PEER.hex()).symlink_to(mine)
    LocalDiscovery(PEER).publish(EndpointAddr(PEER))
    assert mine.read_text() == "precious"
    assert not (folder / PEER.hex()).is_symlink()


def test_a_file_is_there_whole_and_alone_and_written_only_when_needed(folder: Path) -> None:
    discovery = LocalDiscovery(PEER)
    first, second = (EndpointAddr(PEER, direct=(place(f"127.0.0.1:{port}"),)) for port in (5, 6))
    discovery.publish(first)
    path = folder / PEER.hex()
    before = path.stat().st_ino
    discovery.publish(first)
    assert path.stat().st_ino == before
    discovery.publish(second)
    assert LocalDiscovery(bytes(32)).look_up(PEER) == second
    assert [file.name for file in folder.iterdir()] == [PEER.hex()]
    path.unlink()  # a machine that clears its temporary folder
    discovery.publish(second)
    assert path.exists()


@pytest.mark.skipif(os.name != "posix", reason="no modes")
def test_other_users_of_the_machine_may_use_the_folder_and_read_the_file(folder: Path) -> None:
    before = os.umask(0o022)
    try:
        LocalDiscovery(PEER).publish(EndpointAddr(PEER))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert (folder / PEER.hex()).stat().st_mode & 0o777 == 0o644


def test_only_our_own_file_is_removed(folder: Path) -> None:
    ours, successor = LocalDiscovery(PEER), LocalDiscovery(PEER)
    ours.publish(EndpointAddr(PEER, direct=(place("127.0.0.1:5"),)))
    successor.publish(EndpointAddr(PEER, direct=(place("127.0.0.1:6"),)))
    ours.withdraw()
    assert (folder / PEER.hex()).exists()
    successor.withdraw()
    assert not (folder / PEER.hex()).exists()
    successor.withdraw()


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(ConfigurationError, match=r"local discovery cannot write its file .*chmod 1777"):
        LocalDiscovery(PEER).publish(EndpointAddr(PEER))


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_two_nodes_that_know_only_their_keys_meet(folder: Path, loop_thread: LoopThread) -> None:
    server, client = (Node(**LOCAL, loop=loop_thread).start() for _ in range(2))
    server.accept(ALPN, answer)
    found = json.loads((folder / server.endpoint_id.hex()).read_bytes())
    port = next(one.port for one in server.addr().direct if one.ip.version == 4)
    assert found == {"relay_urls": [], "direct_addresses": [f"127.0.0.1:{port}"]}
    connection = client.submit(client.connect(server.endpoint_id, ALPN)).result(SECONDS)
    assert connection.remote_id == server.endpoint_id
    server.close()
    client.close()
    assert list(folder.iterdir()) == []


def test_a_node_looks_at_each_dial(folder: Path, loop_thread: LoopThread) -> None:
    server = Node(relay="none", bind_addr="127.0.0.1:0", loop=loop_thread).start()
    server.accept(ALPN, answer)
    client = Node(**LOCAL, loop=loop_thread).start()
    with pytest.raises(PeerUnreachableError, match="no known address"):
        client.submit(client.connect(server.endpoint_id, ALPN)).result(SECONDS)
    direct = tuple(one for one in server.addr().direct if one.ip.version == 4)
    LocalDiscovery(server.endpoint_id).publish(EndpointAddr(server.endpoint_id, direct=direct))
    assert client.submit(client.connect(server.endpoint_id, ALPN)).result(SECONDS).dialled
    client.close()
    server.close()


def test_other_nodes_neither_write_nor_read_files(folder: Path, loop_thread: LoopThread) -> None:
    with Node(relay="none", bind_addr="127.0.0.1:0", loop=loop_thread):
        assert not folder.exists()


def test_a_file_goes_along_with_the_address(
    folder: Path, loop_thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_discovery, "REPUBLISH_SECONDS", 0.01)
    node = Node(**LOCAL, loop=loop_thread).start()
    path = folder / node.endpoint_id.hex()
    path.unlink()

    async def written() -> None:
        while not path.exists():
            await asyncio.sleep(0.01)

    loop_thread.run(written(), SECONDS)
    node.close()
    assert not path.exists()


def test_a_node_that_cannot_publish_says_so_and_leaves_nothing_open(folder: Path) -> None:
    folder.write_text("a file")
    node = Node(**LOCAL)
    with pytest.raises(ConfigurationError, match="local discovery cannot write"):
        node.start()
    node.close()
    with pytest.raises(NodeClosedError):
        node.start()


SCRIPT = """
import sys, threading
from pathlib import Path
from distro_optim.comm.iroh import local_discovery
from distro_optim.comm.iroh.endpoint import Node
local_discovery.FOLDER = Path(sys.argv[1])
node = Node(relay="none", discovery="local", bind_addr="127.0.0.1:0").start()
print("ready", flush=True)
ENDING
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no SIGINT for others")
@pytest.mark.parametrize("ending", ["threading.Event().wait()", "sys.exit(3)", "raise ValueError"])
def test_the_file_of_a_program_that_ends_is_removed(folder: Path, ending: str) -> None:
    command = [sys.executable, "-c", SCRIPT.replace("ENDING", ending), str(folder)]
    with warm_python.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if "wait" in ending:
            assert len(list(folder.iterdir())) == 1
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert list(folder.iterdir()) == []
