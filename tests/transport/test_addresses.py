"""Addresses of peers: their bytes, and the book that remembers and forgets them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm import postcard
from distro_optim.comm.addresses import MAX_ADDRESSES, AddressBook, EndpointAddr, SocketAddr
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError, TruncatedError

pytestmark = pytest.mark.waiting


PEER, OTHER = b"\xaa" * 32, b"\xbb" * 32
RELAY = "https://use1-1.relay.n0.iroh.link./"


def decode(data: bytes) -> EndpointAddr:
    return postcard.decode(EndpointAddr, data)


socket_addrs = st.builds(SocketAddr, st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(0, 0xFFFF))
endpoint_addrs = st.builds(
    EndpointAddr,
    st.binary(min_size=32, max_size=32),
    st.lists(st.from_regex(r"\Ahttps?://[a-z]{1,20}\.?(:3340)?/\Z"), max_size=4).map(tuple),
    st.lists(socket_addrs, max_size=8).map(tuple),
)


def test_the_bytes_are_those_of_rust() -> None:
    # Taken from the endpoint ticket of the iroh package.
    address = EndpointAddr(
        PEER, (RELAY,), tuple(map(SocketAddr.parse, ["[2001:db8::1]:4433", "127.0.0.1:1234", "10.0.0.1:65535"]))
    )
    expected = (
        "040023" + RELAY.encode().hex() + "01000a000001ffff03" + "01007f000001d209"
        "010120010db8000000000000000000000001d122"
    )
    assert postcard.encode(address).hex() == PEER.hex() + expected


@pytest.mark.slow
@given(endpoint_addrs)
def test_addresses_survive_the_round_trip(address: EndpointAddr) -> None:
    assert decode(postcard.encode(address)) == address


@given(st.one_of(st.binary(max_size=100), st.binary(max_size=60).map(lambda tail: PEER + tail)))
def test_any_other_bytes_raise_only_protocol_errors(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError:
        pass


@pytest.mark.slow
@given(endpoint_addrs, st.data())
def test_a_cut_address_is_truncated(address: EndpointAddr, data: st.DataObject) -> None:
    encoded = postcard.encode(address)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(TruncatedError):
        decode(encoded[:cut])


@pytest.mark.parametrize(
    ("tail", "error"),
    [
        ("010201", ProtocolError),  # the custom kind
        ("01010000", TruncatedError),
        ("01010200000000", ProtocolError),  # a third address family
        ("010100" + "7f000001" + "808004", ProtocolError),  # port 65536
        ("0100" + "04" + b"ftp:".hex(), ProtocolError),
        ("0100" + "09" + b"https://\xff".hex(), ProtocolError),
        ("0100" + "0a" + b"https://\n ".hex(), ProtocolError),
        ("0100" + "8108" + (b"https://" + b"a" * 1017).hex(), LimitExceededError),
        ("41" + "01007f00000101" * 65, LimitExceededError),
        ("ffffffffffffffffff01", LimitExceededError),
    ],
)
def test_hostile_addresses_are_refused(tail: str, error: type[ProtocolError]) -> None:
    with pytest.raises(error):
        decode(PEER + bytes.fromhex(tail))


def test_equal_addresses_give_equal_bytes_whatever_their_order() -> None:
    first, second = SocketAddr.parse("10.0.0.2:1"), SocketAddr.parse("10.0.0.2:2")
    assert postcard.encode(EndpointAddr(PEER, (), (first, second))) == postcard.encode(
        EndpointAddr(PEER, (), (second, first, first))
    )


@pytest.mark.parametrize("text", ["127.0.0.1:4433", "[::1]:0", "[2001:db8::1]:65535"])
def test_socket_addresses_read_what_they_print(text: str) -> None:
    assert str(SocketAddr.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1", "::1:80", "[127.0.0.1]:80", "localhost:80", "127.0.0.1:65536", "1.2.3.4:-1", "1.2.3.4:²"]
)
def test_other_texts_are_no_socket_addresses(text: str) -> None:
    with pytest.raises(ConfigurationError):
        SocketAddr.parse(text)


def test_a_learnt_address_is_forgotten_in_time_and_a_told_one_is_not() -> None:
    book = AddressBook()
    told, learnt = SocketAddr.parse("10.0.0.1:1"), SocketAddr.parse("10.0.0.2:2")
    book.add(EndpointAddr(PEER, (), (told,)))
    book.learn(EndpointAddr(PEER, (), (learnt,)), now=0.0, lifetime=300.0)
    assert book.lookup(PEER, 299.0).direct == (told, learnt)
    assert book.lookup(PEER, 300.0).direct == (told,)
    assert book.lookup(OTHER, 0.0).is_empty
    book.forget(PEER)
    assert book.lookup(PEER, 0.0).is_empty


def test_a_word_that_is_said_again_lasts_from_then_on() -> None:
    book = AddressBook()
    known, nowhere = SocketAddr.parse("10.0.0.2:2"), SocketAddr.parse("10.0.0.2:0")
    for time in (0.0, 200.0):
        book.learn(EndpointAddr(PEER, (), (known, nowhere)), now=time, lifetime=300.0)
    assert book.lookup(PEER, 499.0).direct == (known,)
    assert book.lookup(PEER, 501.0).is_empty


def test_newer_word_replaces_older_word() -> None:
    book = AddressBook()
    old, new = SocketAddr.parse("10.0.0.1:1"), SocketAddr.parse("10.0.0.2:2")
    book.learn(EndpointAddr(PEER, (), (old,)), now=0.0)
    book.learn(EndpointAddr(PEER, (), (new,)), now=1.0)
    assert book.lookup(PEER, 2.0).direct == (new,)
    book.learn(EndpointAddr(PEER), now=3.0)
    assert book.lookup(PEER, 4.0).is_empty


def test_rumours_about_many_peers_do_not_fill_the_book_nor_push_out_what_the_user_said() -> None:
    book = AddressBook(max_peers=10)
    address = SocketAddr.parse("10.0.0.1:1")
    book.add(EndpointAddr(PEER, (), (address,)))
    for number in range(1000):
        book.learn(EndpointAddr(number.to_bytes(32, "big"), (), (address,)), now=0.0)
    assert len(book) == 11
    assert not book.lookup(PEER, 0.0).is_empty
    assert not book.lookup((999).to_bytes(32, "big"), 0.0).is_empty
    assert book.lookup((1).to_bytes(32, "big"), 0.0).is_empty


def test_nobody_can_make_us_dial_places_where_no_peer_lives_or_too_many_of_them() -> None:
    book = AddressBook()
    nowhere = ["0.0.0.0:80", "224.0.0.1:80", "255.255.255.255:80", "[::]:80", "[ff02::1]:80", "10.0.0.1:0"]
    book.learn(EndpointAddr(PEER, (), tuple(map(SocketAddr.parse, nowhere))), now=0.0)
    assert book.lookup(PEER, 0.0).is_empty
    many = tuple(SocketAddr(IPv4Address(number + 1), 80) for number in range(1000))
    book.learn(EndpointAddr(PEER, (), many), now=0.0)
    assert len(book.lookup(PEER, 0.0).direct) == MAX_ADDRESSES


def test_wrong_addresses_are_refused_at_construction() -> None:
    with pytest.raises(ConfigurationError):
        EndpointAddr(b"short")
    with pytest.raises(ConfigurationError):
        SocketAddr(IPv6Address("::1"), 70000)
    with pytest.raises(ConfigurationError):
        AddressBook(max_peers=0)
    with pytest.raises(ConfigurationError):
        EndpointAddr(PEER).merged(EndpointAddr(OTHER))
