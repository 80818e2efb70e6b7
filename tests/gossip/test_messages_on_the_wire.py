"""The bytes of messages and frames, recorded from iroh-gossip 0.97, and what happens to bytes that are none."""

from __future__ import annotations

import ipaddress
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.gossip.config import GossipConfig
from distro_optim.comm.iroh.gossip.frames import FrameReader, encode_frame, encode_header
from distro_optim.comm.iroh.gossip.messages import (
    Disconnect,
    ForwardJoin,
    Gossip,
    Graft,
    IHave,
    Join,
    Message,
    Neighbor,
    PeerInfo,
    Prune,
    Shuffle,
    ShuffleReply,
    decode_message,
    encode_message,
    message_id,
)
from distro_optim.comm.iroh.gossip.peer_data import MAX_PEER_DATA, decode_peer_data, encode_peer_data
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError
from gossip.strategies import messages

pytestmark = pytest.mark.waiting


ID = b"\xaa" * 32
HI = message_id(b"hi")
RECORDED: list[tuple[Message, str]] = [
    (Join(None), "000000"),
    (Join(b""), "00000100"),
    (ForwardJoin(PeerInfo(ID, b"\x01\x02"), 6), f"0001{ID.hex()}0102010206"),
    (Shuffle(ID, (PeerInfo(ID),), 6), f"0002{ID.hex()}01{ID.hex()}0006"),
    (ShuffleReply(()), "000300"),
    (Neighbor(high=True), "00040000"),
    (Neighbor(high=False, data=b""), "0004010100"),
    (Disconnect(alive=True), "00050100"),
    (Gossip(HI, b"hi", 0), f"0100{HI.hex()}0268690000"),
    (Gossip(HI, b"hi", None), f"0100{HI.hex()}02686901"),
    (Prune(), "0101"),
    (Graft(None, 3), "01020003"),
    (Graft(ID, 0), f"010201{ID.hex()}00"),
    (IHave(((ID, 300),)), f"010301{ID.hex()}ac02"),
]


@pytest.mark.parametrize(("message", "recorded"), RECORDED, ids=lambda value: type(value).__name__)
def test_a_message_has_the_recorded_bytes(message: Message, recorded: str) -> None:
    assert encode_message(message).hex() == recorded
    assert decode_message(bytes.fromhex(recorded)) == message


def test_the_id_of_a_message_is_the_blake3_hash_of_its_content() -> None:
    assert HI.hex() == "85052e9aab1b67b6622d94a08441b09fd5b7aca61ee360416d70de5da67d86ca"


@given(messages(st.binary(min_size=32, max_size=32)))
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


def test_bytes_after_a_message_are_ignored_as_in_rust() -> None:
    assert decode_message(b"\x01\x01later fields") == Prune()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        decode_message(data)
    except ProtocolError:
        pass


@given(messages(st.binary(min_size=32, max_size=32)), st.data())
def test_a_message_cut_or_bent_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    encoded = bytearray(encode_message(message))
    position = data.draw(st.integers(0, len(encoded) - 1))
    if data.draw(st.booleans()):
        del encoded[position:]
        with pytest.raises(ProtocolError):
            decode_message(encoded)
        return
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        decode_message(encoded)
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"\x00\x00\x01", id="peer-data"),
        pytest.param(b"\x00\x02" + ID, id="nodes"),
        pytest.param(b"\x00\x03", id="nodes-of-a-reply"),
        pytest.param(b"\x01\x00" + ID, id="content"),
        pytest.param(b"\x01\x03", id="announcements"),
    ],
)
def test_a_length_of_two_to_the_64_allocates_nothing(start: bytes) -> None:
    frame = start + b"\xff" * 9 + b"\x01" + bytes(100)
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode_message(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10


@pytest.mark.parametrize(
    "frame", [b"", b"\x02\x00", b"\x00\x06", b"\x01\x04", b"\x00\x04\x02\x00", b"\x01\x00" + ID + b"\x00\x02"]
)
def test_an_unknown_tag_is_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(frame)


# Frames


@given(st.lists(st.binary(max_size=50), max_size=8), st.data())
def test_frames_come_out_whole_wherever_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = encode_header(ID) + b"".join(encode_frame(payload) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = FrameReader(4096)

    frames = [
        bytes(frame)
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for frame in reader.feed(stream[start:stop])
    ]

    assert reader.topic == ID
    assert frames == payloads


def test_a_frame_of_the_maximum_size_is_taken_and_one_byte_more_is_refused() -> None:
    reader = FrameReader(4096)
    assert len(reader.feed(encode_header(ID) + encode_frame(bytes(4096)))) == 1
    with pytest.raises(LimitExceededError):
        reader.feed((4097).to_bytes(4, "big"))


@pytest.mark.parametrize("length", [0, 31, 33, 2**32 - 1])
def test_a_stream_that_does_not_begin_with_a_topic_is_refused_at_its_first_four_bytes(length: int) -> None:
    with pytest.raises(ProtocolError):
        FrameReader(4096).feed(length.to_bytes(4, "big"))


@given(st.binary(max_size=300))
def test_any_bytes_on_a_stream_are_frames_or_a_protocol_error(data: bytes) -> None:
    reader = FrameReader(512)
    try:
        reader.feed(data)
        reader.feed(data)
    except ProtocolError:
        pass


@pytest.mark.parametrize("size", [512, 4096, 1 << 15])
def test_the_largest_content_fits_in_a_message_however_far_it_has_travelled(size: int) -> None:
    content = bytes(GossipConfig(max_message_size=size).max_content_size)
    assert len(encode_message(Gossip(ID, content, 0xFFFF))) == size - 1


def test_a_maximum_size_that_membership_messages_do_not_fit_in_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="512"):
        GossipConfig(max_message_size=511)


# Peer data


@pytest.mark.parametrize(
    ("address", "recorded"),
    [
        (EndpointAddr(ID, (), (SocketAddr.parse("127.0.0.1:1234"),)), "0001007f000001d209"),
        (EndpointAddr(ID, ("https://r.example./",)), "01" + "13" + b"https://r.example./".hex() + "00"),
        (EndpointAddr(ID, ("http://10.0.0.9:3340/",)), "01" + "15" + b"http://10.0.0.9:3340/".hex() + "00"),
    ],
)
def test_peer_data_has_the_recorded_bytes(address: EndpointAddr, recorded: str) -> None:
    assert encode_peer_data(address).hex() == recorded
    assert decode_peer_data(ID, bytes.fromhex(recorded)) == address


def test_empty_peer_data_says_nothing() -> None:
    assert decode_peer_data(ID, b"").is_empty


@given(st.binary(max_size=MAX_PEER_DATA + 10))
def test_any_peer_data_is_addresses_or_a_protocol_error(data: bytes) -> None:
    try:
        decode_peer_data(ID, data)
    except ProtocolError:
        pass


def test_peer_data_of_a_host_with_a_hundred_interfaces_is_shortened() -> None:
    many = tuple(SocketAddr(ipaddress.ip_address(f"2001:db8::{i:x}"), 4433) for i in range(1, 101))
    data = encode_peer_data(EndpointAddr(ID, (), many))
    assert len(data) <= MAX_PEER_DATA
    assert 0 < len(decode_peer_data(ID, data).direct) < 100
