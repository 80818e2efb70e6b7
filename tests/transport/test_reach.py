"""What users may write for relay servers, discovery and external addresses, and what they are told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.comm.addresses import SocketAddr
from distro_optim.comm.iroh.reach import (
    MAX_RELAYS,
    PSYCHE_RELAYS,
    parse_discovery,
    parse_external_addrs,
    parse_relays,
)
from distro_optim.errors import ConfigurationError


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("default", "default"),
        ("n0", "default"),
        ("N0", "default"),
        ("none", "none"),
        (" disabled ", "none"),
        ("psyche", PSYCHE_RELAYS),
        (["psyche"], PSYCHE_RELAYS),
        ("https://relay.example/", ("https://relay.example/",)),
        ("https://relay.example", ("https://relay.example/",)),
        ("http://127.0.0.1:3340", ("http://127.0.0.1:3340/",)),
        ("http://[::1]:3340/", ("http://[::1]:3340/",)),
        ("https://a.example/?token=x", ("https://a.example/?token=x",)),
        ("https://a.example?token=x", ("https://a.example/?token=x",)),
        ("https://a.example, https://b.example", ("https://a.example/", "https://b.example/")),
        ("https://a.example https://a.example/", ("https://a.example/",)),
        (["https://a.example", "http://b.example:80/"], ("https://a.example/", "http://b.example:80/")),
        (("https://a.example,https://b.example", "https://c.example"), tuple(f"https://{x}.example/" for x in "abc")),
    ],
)
def test_relay_servers_have_names_or_are_urls(said: Any, meant: object) -> None:
    assert parse_relays(said) == meant


@pytest.mark.parametrize(
    "said",
    [
        "", " ", ",", "nearest", "relay.example", "https://", "https:///", "https://relay.example:many/",
        "https://relay.example:0/", "https://[::1/", "ftp://relay.example/", "https://me@relay.example/",
        "https://relay.example/#a", "https://rel\u00e4y.example/", "https://" + "a" * 600, "none https://relay.example/",
        "default,psyche", [], [None], [b"https://relay.example/"], b"none", None, 7,
    ],
)  # fmt: skip
def test_what_names_no_relay_server_is_refused_in_a_sentence(said: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be default, psyche, none or a URL") as error:
        parse_relays(said, name="--iroh-relay")
    assert error.value.name == "--iroh-relay"
    assert str(error.value).startswith("--iroh-relay must")


def test_relay_servers_are_bounded() -> None:
    with pytest.raises(ConfigurationError, match="at most"):
        parse_relays([f"https://{n}.example/" for n in range(MAX_RELAYS + 1)])


def test_the_relay_servers_of_psyche_are_urls_like_others() -> None:
    assert parse_relays(PSYCHE_RELAYS) == PSYCHE_RELAYS


@pytest.mark.parametrize(
    ("said", "relays", "meant"),
    [
        ("n0", "none", "n0"),
        ("LOCAL", "default", "local"),
        ("none", "default", "none"),
        (True, "none", "n0"),
        (False, "default", "none"),
        (None, "default", "n0"),
        (None, PSYCHE_RELAYS, "n0"),  # as Psyche's clients have it
        (None, "none", "none"),
        (None, ("https://relay.example/",), "none"),
    ],
)
def test_discovery_suits_the_relay_servers_unless_somebody_says_otherwise(said: Any, relays: Any, meant: str) -> None:
    assert parse_discovery(said, relays) == meant


@pytest.mark.parametrize("said", ["", "mdns", 1, ["local"]])
def test_another_discovery_is_refused_in_a_sentence(said: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"must be n0 .the internet., local .* or none"):
        parse_discovery(said, "none")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, []),
        ("203.0.113.7:4433", ["203.0.113.7:4433"]),
        ("[2001:db8::7]:4433", ["[2001:db8::7]:4433"]),
        ("203.0.113.7:4433, 198.51.100.1:4433", ["203.0.113.7:4433", "198.51.100.1:4433"]),
        (["203.0.113.7:4433", "203.0.113.7:4433"], ["203.0.113.7:4433"]),
        ("203.0.113.7:4433,", ["203.0.113.7:4433"]),
    ],
)
def test_external_addresses_are_addresses_with_ports(said: Any, meant: list[str]) -> None:
    assert parse_external_addrs(said) == tuple(map(SocketAddr.parse, meant))


@pytest.mark.parametrize(
    "said",
    [
        "", "203.0.113.7", "203.0.113.7:", "203.0.113.7:0", "203.0.113.7:65536", "203.0.113.7:-1", ":4433", "4433",
        "example.org:4433", "0.0.0.0:4433", "[::]:4433", "224.0.0.1:4433", "255.255.255.255:4433", "2001:db8::7:4433",
        "[fe80::1%eth0]:4433", "https://203.0.113.7:4433/", [], [None], 4433, b"1.2.3.4:5",
    ],
)  # fmt: skip
def test_what_is_no_external_address_is_refused_in_a_sentence(said: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"must be the IP address and port .* such as 203\.0\.113\.7:4433"):
        parse_external_addrs(said)


@settings(max_examples=40)
@given(st.text(max_size=20))
def test_arbitrary_text_raises_only_our_own_error(text: str) -> None:
    for read in (parse_relays, lambda said: parse_discovery(said, "none"), parse_external_addrs):
        try:
            read(text)
        except ConfigurationError:
            pass
