"""Tickets as text and inside messages, byte for byte as Rust writes them."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.tickets import BlobFormat, BlobTicket, EndpointTicket
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError

pytestmark = pytest.mark.waiting


# The id and hash of the crates' own test vectors (iroh-tickets `src/endpoint.rs`, iroh-blobs `src/ticket.rs`).
PEER = bytes.fromhex("ae58ff8833241ac82d6ff7611046ed67b5072d142c588d0063e942d9a75502b6")
HASH = bytes.fromhex("0b84d358e4c8be6c38626b2182ff575818ba6bd3f4b90464994be14cb354a072")

addrs = st.builds(
    EndpointAddr,
    st.just(PEER),
    st.lists(st.sampled_from(["https://a./", "https://b./", "http://c.example:3340/"]), max_size=1).map(tuple),
    st.lists(st.builds(SocketAddr, st.ip_addresses(), st.integers(0, 0xFFFF)), max_size=6).map(tuple),
)
blob_tickets = st.builds(BlobTicket, addrs, st.sampled_from(BlobFormat), st.binary(min_size=32, max_size=32))


def text(prefix: str, data: bytes) -> str:
    return prefix + base64.b32encode(data).decode().rstrip("=").lower()


def test_an_endpoint_ticket_is_that_of_the_crate() -> None:
    addr = EndpointAddr(PEER, ("http://derp.me./",), (SocketAddr.parse("127.0.0.1:1024"),))
    expected = "00" + PEER.hex() + "020010687474703a2f2f646572702e6d652e2f01007f0000018008"
    assert str(EndpointTicket(addr)) == text("endpoint", bytes.fromhex(expected))


def test_a_blob_ticket_is_that_of_the_crate() -> None:
    assert str(BlobTicket.raw(EndpointAddr(PEER), HASH)) == text("blob", b"\0" + PEER + b"\0\0\0" + HASH)


def test_a_blob_ticket_in_a_message_is_a_tuple() -> None:
    # Psyche's fixture: the key of the seed 00...01, 127.0.0.1:4433, raw.
    key = bytes.fromhex("4cb5abf6ad79fbf5abbccafcc269d85cd2651ed4b885b5869f241aedf0a5ba29")
    digest = bytes.fromhex("f3adff931096c81f8bfc4ed091fc58cf865072bc9764fe00a83e880a7ed6f46c")
    ticket = BlobTicket.raw(EndpointAddr(key, direct=(SocketAddr.parse("127.0.0.1:4433"),)), digest)
    assert postcard.encode(ticket) == key + bytes.fromhex("0101007f000001d12200") + digest


@pytest.mark.slow
@given(addrs)
def test_the_iroh_package_reads_and_writes_the_same_endpoint_tickets(addr: EndpointAddr) -> None:
    import iroh

    relay = addr.relays[0] if addr.relays else None
    raw = iroh.EndpointAddr(iroh.EndpointId.from_bytes(PEER), relay, [str(a) for a in addr.direct])
    ticket = str(EndpointTicket(addr))
    assert str(iroh.EndpointTicket.from_addr(raw)) == ticket
    assert iroh.EndpointTicket.from_string(ticket).endpoint_addr().id().to_bytes() == PEER


@given(addrs)
def test_endpoint_tickets_survive_the_round_trip(addr: EndpointAddr) -> None:
    assert EndpointTicket.parse(str(EndpointTicket(addr))) == EndpointTicket(addr)


@pytest.mark.slow
@given(blob_tickets)
def test_blob_tickets_survive_both_round_trips(ticket: BlobTicket) -> None:
    assert BlobTicket.parse(str(ticket)) == ticket
    assert BlobTicket.parse("  " + str(ticket).upper().replace("BLOB", "blob", 1) + "\n") == ticket
    assert postcard.decode(BlobTicket, postcard.encode(ticket)) == ticket


@given(st.one_of(st.text(max_size=80), st.binary(max_size=80).map(lambda data: text("blob", data))))
def test_any_other_text_raises_only_protocol_errors(words: str) -> None:
    for kind in (BlobTicket, EndpointTicket):
        try:
            kind.parse(words)
        except ProtocolError:
            pass


@given(blob_tickets, st.data())
def test_a_ticket_with_one_character_changed_is_refused_or_another(ticket: BlobTicket, data: st.DataObject) -> None:
    words = str(ticket)
    place = data.draw(st.integers(4, len(words) - 1))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda c: c != words[place]))
    try:
        changed = BlobTicket.parse(words[:place] + other + words[place + 1 :])
    except ProtocolError:
        return
    assert changed != ticket or str(changed) == words  # a set written in another order is the same address


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (BlobTicket, ""),
        (BlobTicket, "blob"),
        (BlobTicket, str(EndpointTicket(EndpointAddr(PEER)))),
        (EndpointTicket, "endpoint1"),
        (BlobTicket, text("blob", b"\1" + PEER + b"\0\0\0" + HASH)),
        (BlobTicket, text("blob", b"\0" + PEER + b"\0\0\2" + HASH)),
        (BlobTicket, text("blob", b"\0" + PEER + b"\0\0\0" + HASH + b"\0")),
        (BlobTicket, text("blob", b"\0" + PEER + b"\0\0\0" + HASH[:-1])),
        (BlobTicket, "blob" + "ä" * 20),
    ],
)
def test_malformed_tickets_are_refused(kind: Any, words: str) -> None:
    with pytest.raises(ProtocolError):
        kind.parse(words)


def test_an_endless_ticket_is_refused_unread() -> None:
    with pytest.raises(LimitExceededError):
        BlobTicket.parse("blob" + "a" * 10_000_000)


def test_left_over_bits_do_not_make_a_second_text_for_one_ticket() -> None:
    words = str(BlobTicket.raw(EndpointAddr(PEER), HASH))
    others = [words[:-1] + digit for digit in "abcdefghijklmnopqrstuvwxyz234567" if digit != words[-1]]
    meant = set()
    for other in others:
        try:
            meant.add(BlobTicket.parse(other))
        except ProtocolError:
            pass
    assert BlobTicket.raw(EndpointAddr(PEER), HASH) not in meant


def test_a_hash_has_32_bytes() -> None:
    with pytest.raises(ConfigurationError):
        BlobTicket.raw(EndpointAddr(PEER), b"short")
