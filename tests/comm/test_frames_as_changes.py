"""Frames that say what has changed: the same payloads come out, few bytes go in, and a server cannot abuse them."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm import changes
from distro_optim.comm.framing import ClientLink, LinkState, SecretKey, ServerLink, client_envelope, server_envelope
from distro_optim.comm.serving.connection import Connection
from distro_optim.comm.serving.limits import ServerLimits
from distro_optim.errors import LimitExceededError, ProtocolError

LIMIT = 1 << 20
PIECE = 16 * 1024
KEY = SecretKey(bytes(range(32)))
NONCE = bytes(range(100, 124))


@dataclass(frozen=True)
class State:
    body: bytes


FROM_CLIENT = client_envelope(State)
FROM_SERVER = server_envelope(State)


def noise(size: int, seed: int = 0) -> bytes:
    return b"\x01" + random.Random(seed).randbytes(size - 1)


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 5), st.integers(0, 90_000))
def test_what_comes_out_is_what_went_in(head: bytes, inserted: bytes, seed: int, at: int) -> None:
    old = b"\x01" + head + noise(seed * 20_000 + 1, seed)
    new = old[: at + 1] + inserted + old[at + 1 + len(head) :]
    assert changes.apply(old, changes.change_of(old, new), limit=LIMIT) == new


def test_a_report_in_the_middle_of_a_large_state_costs_little_more_than_itself() -> None:
    old = noise(86_000)
    new = old[:20_000] + noise(560, 1) + old[20_000:]
    assert len(changes.change_of(old, new)) < 1_400
    assert len(changes.change_of(new, new)) < 32


def test_what_has_nothing_in_common_is_sent_as_it_is() -> None:
    assert changes.change_of(noise(50_000), other := noise(50_000, 1)) == other
    assert changes.apply(None, other, limit=LIMIT) == other


def change(size: int, *pieces: bytes) -> bytes:
    return b"\x02" + struct.pack(">I", size) + b"".join(struct.pack(">H", len(piece)) + piece for piece in pieces)


def packed(piece: bytes, old: bytes = b"") -> bytes:
    packer = zlib.compressobj(zdict=old)
    return packer.compress(piece) + packer.flush()


BOMB = packed(bytes(60_000_000))


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        ("nothing behind the tag", b"\x02"),
        ("no piece", change(10)),
        ("a piece that is cut off", change(10, packed(b"x" * 10))[:-1]),
        ("too short a piece", change(10, packed(b"x" * 9))),
        ("too long a piece", change(10, packed(b"x" * 11))),
        ("a bomb", change(PIECE, BOMB)),
        ("no zlib", change(10, b"nonsense")),
        ("something behind the stream", change(10, packed(b"x" * 10) + b"more")),
        ("something behind the change", change(10, packed(b"x" * 10)) + b"more"),
        ("a place that the old payload has not", change(40_000, b"", b"", b"")),
    ],
)
def test_malformed_changes_are_refused(what: str, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        changes.apply(b"old", payload, limit=LIMIT)


def test_a_change_of_nothing_is_refused() -> None:
    with pytest.raises(ProtocolError, match="before there was anything"):
        changes.apply(None, change(0), limit=LIMIT)


def test_what_a_change_makes_is_bounded_before_anything_is_unpacked() -> None:
    with pytest.raises(LimitExceededError):
        changes.apply(b"old", change(LIMIT + 1), limit=LIMIT)


@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    try:
        changes.apply(noise(20_000), b"\x02" + data, limit=LIMIT)
    except ProtocolError:
        pass


# -- the handshake -----------------------------------------------------------------------------------------------------


def shake(challenge: bytes, *, takes: bool) -> tuple[ServerLink, ClientLink]:
    server = ServerLink(challenge, FROM_CLIENT, FROM_SERVER)
    client = ClientLink(KEY, FROM_SERVER, FROM_CLIENT, takes_changes=takes)
    client.receive(server.opening())
    server.receive(client.data_to_send())
    assert (server.state, server.peer) == (LinkState.OPEN, KEY.public)
    return server, client


@pytest.mark.parametrize("challenge", [changes.announce(NONCE), NONCE + bytes(8)])
@pytest.mark.parametrize("takes", [True, False])
def test_both_ends_have_to_want_them(challenge: bytes, takes: bool) -> None:
    """A server of Psyche's draws all 32 bytes, and its clients answer with these and nothing else."""
    server, _ = shake(challenge, takes=takes)
    assert server.sends_changes == (takes and changes.announces(challenge))


def test_who_did_not_ask_for_changes_gets_none_and_takes_none() -> None:
    _, client = shake(changes.announce(NONCE), takes=False)
    with pytest.raises(ProtocolError):
        client.receive(b"\x00\x00\x00\x05" + change(0))


def test_a_client_cannot_ask_for_changes_that_were_not_announced() -> None:
    server = ServerLink(NONCE + bytes(8), FROM_CLIENT, FROM_SERVER)
    asking = ClientLink(KEY, FROM_SERVER, FROM_CLIENT, takes_changes=True)
    asking.receive(ServerLink(changes.announce(NONCE), FROM_CLIENT, FROM_SERVER).opening())
    with pytest.raises(ProtocolError):
        server.receive(asking.data_to_send())


# -- a connection ------------------------------------------------------------------------------------------------------


def connect(*, takes: bool) -> tuple[Connection, ClientLink]:
    connection = Connection(
        changes.announce(NONCE), FROM_CLIENT, FROM_SERVER, address="", limits=ServerLimits(unsent_frames=2), now=0.0
    )
    client = ClientLink(KEY, FROM_SERVER, FROM_CLIENT, takes_changes=takes)
    opening = connection.next_frame()
    assert opening is not None
    client.receive(opening)
    connection.receive(client.data_to_send(), 0.0)
    return connection, client


@pytest.mark.parametrize("takes", [True, False])
def test_a_slow_reader_misses_states_and_gets_the_newest_whole(takes: bool) -> None:
    """What it has is what was written, not what was put in line and dropped."""
    connection, client = connect(takes=takes)
    server = ServerLink(NONCE + bytes(8), FROM_CLIENT, FROM_SERVER)
    states = [State(noise(3_000) + bytes([n])) for n in range(7)]
    came, sizes = [], []
    for state in states:
        connection.send(server.encode(state), 0.0)
        if state in states[:2] or state is states[-1]:
            while (frame := connection.next_frame()) is not None:
                sizes.append(len(frame))
                came += client.receive(frame)
    assert came == [states[0], states[1], states[5], states[6]]
    assert sizes[0] > 3_000
    assert all(size < 100 for size in sizes[1:]) == takes
