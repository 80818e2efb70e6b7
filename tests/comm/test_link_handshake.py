"""Frames and the challenge: what opens a link, what closes it, how much a stranger can make us keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.framing import (
    ClientLink,
    FrameDecoder,
    LinkState,
    SecretKey,
    ServerLink,
    client_envelope,
    encode_frame,
    server_envelope,
)
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError


@dataclass(frozen=True)
class Join:
    run_id: str


@dataclass(frozen=True)
class Leave:
    pass


KEY = SecretKey(bytes(range(32)))
CHALLENGE = b"\xaa" * 32
FROM_CLIENT = client_envelope(Join | Leave)
FROM_SERVER = server_envelope(Join | Leave)
RESPONSE = bytes.fromhex(
    "00000084" "008101" "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8" "20" + "aa" * 32 +
    "f753fd68d1bf31d2b408a46621c57cf5a7da9cee340a4faa70380b3a0d6d9056"
    "70dbbbc2a41f916e9d248b9d8cb3c36cf8284b03cb6908ce854b8f226b63cb06"
)  # fmt: skip


def links(challenge: bytes = CHALLENGE) -> tuple[ServerLink, ClientLink]:
    return ServerLink(challenge, FROM_CLIENT, FROM_SERVER), ClientLink(KEY, FROM_SERVER, FROM_CLIENT)


def open_links() -> tuple[ServerLink, ClientLink]:
    server, client = links()
    client.receive(server.opening())
    server.receive(client.data_to_send())
    return server, client


def test_the_handshake_has_psyches_bytes() -> None:
    server, client = links()
    assert server.opening() == bytes.fromhex("00000021" "00") + CHALLENGE  # fmt: skip
    assert client.receive(server.opening()) == []
    answer = client.data_to_send()
    assert answer == RESPONSE
    assert client.state is LinkState.OPEN
    assert server.receive(answer) == []
    assert server.state is LinkState.OPEN
    assert server.peer == KEY.public
    assert client.data_to_send() == b""


def test_messages_flow_both_ways_after_it() -> None:
    server, client = open_links()
    frame = client.encode(Join("test"))
    assert frame == bytes.fromhex("00000007" "01000474657374")  # fmt: skip
    assert server.receive(frame + client.encode(Leave())) == [Join("test"), Leave()]
    assert client.receive(server.encode(Join("back"))) == [Join("back")]


@pytest.mark.slow
@given(st.lists(st.integers(1, 50), max_size=20))
def test_pieces_of_any_size_give_the_same_messages(cuts: list[int]) -> None:
    server, client = links()
    client.receive(server.opening())
    stream = client.data_to_send() + client.encode(Join("a")) + client.encode(Leave()) + client.encode(Join("b"))
    got: list[Any] = []
    for cut in [*cuts, len(stream)]:
        got += server.receive(stream[:cut])
        stream = stream[cut:]
    assert got == [Join("a"), Leave(), Join("b")]


# -- attacks -------------------------------------------------------------------------------------------------------


def refused(link: ServerLink | ClientLink, data: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        link.receive(data)
    assert link.state is LinkState.CLOSED
    with pytest.raises(ProtocolError, match="closed"):
        link.receive(b"")


def test_a_message_before_the_answer_closes_the_link() -> None:
    server, client = links()
    refused(server, client.encode(Join("test")), "before the challenge")


def test_a_replayed_answer_to_an_older_challenge_is_refused() -> None:
    server, _ = links(b"\xbb" * 32)
    refused(server, RESPONSE, "another challenge")


def test_an_answer_with_a_forged_signature_is_refused() -> None:
    server, _ = links()
    refused(server, RESPONSE[:-1] + b"\x07", "signature")


def test_a_second_answer_closes_the_link() -> None:
    server, _ = open_links()
    refused(server, RESPONSE, "handshake is over")


def test_a_second_challenge_closes_the_link() -> None:
    """Else a server could use us to sign whatever 32 bytes it likes, at any time."""
    server, client = open_links()
    refused(client, server.opening(), "handshake is over")


def test_a_server_that_does_not_challenge_is_refused() -> None:
    server, client = links()
    refused(client, server.encode(Leave()), "where a challenge was expected")


def test_a_stranger_cannot_announce_a_long_frame_before_it_has_named_itself() -> None:
    server, _ = links()
    with pytest.raises(LimitExceededError):
        server.receive((2000).to_bytes(4, "big"))
    server, client = open_links()
    assert server.receive(client.encode(Join("x" * 5000))) == [Join("x" * 5000)]


@pytest.mark.slow
@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_raise_only_protocol_errors(data: bytes, opened: bool) -> None:
    for link in open_links() if opened else links():
        try:
            link.receive(data)
        except ProtocolError:
            assert link.state is LinkState.CLOSED


def test_a_frame_above_the_limit_is_refused_from_its_header_alone() -> None:
    frames = FrameDecoder(100)
    with pytest.raises(LimitExceededError, match="101 bytes"):
        list(frames.feed((101).to_bytes(4, "big")))
    with pytest.raises(ConfigurationError):
        encode_frame(bytes(101), limit=100)


def test_the_buffer_holds_no_more_than_one_unfinished_frame() -> None:
    frames = FrameDecoder(100)
    stream = encode_frame(bytes(100)) * 1000
    assert len(list(frames.feed(stream + encode_frame(bytes(100))[:50]))) == 1000
    assert len(frames) == 50


@pytest.mark.slow
@given(st.lists(st.binary(max_size=20), max_size=10), st.integers(1, 30))
def test_frames_round_trip(payloads: list[bytes], step: int) -> None:
    stream = b"".join(encode_frame(payload) for payload in payloads)
    frames = FrameDecoder(20)
    got = [payload for i in range(0, len(stream), step) for payload in frames.feed(stream[i : i + step])]
    assert got == payloads
    assert len(frames) == 0
