"""How others reach an endpoint, in the words of its user: relay servers, discovery, external addresses. No I/O.

=====================  =====================================================================
``default``, ``n0``    the public relay servers of n0, who make iroh
``psyche``             those of Psyche (PsycheFoundation/psyche ``shared/network/src/lib.rs``)
``none``, ``disabled`` no relay server
URLs                   of one's own, ``https://`` or ``http://``, with commas or spaces between
=====================  =====================================================================

The second name of a pair is what Psyche's client calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal
from urllib.parse import urlsplit

from ...errors import ConfigurationError
from ..addresses import MAX_ADDRESSES, MAX_RELAY_URL_BYTES, SocketAddr

__all__ = [
    "PSYCHE_RELAYS",
    "Discovery",
    "Relays",
    "is_relay_url",
    "parse_discovery",
    "parse_external_addrs",
    "parse_relays",
]

Relays = Literal["default", "none"] | tuple[str, ...]
"""Relay servers as an endpoint takes them."""

Discovery = Literal["n0", "local", "none"]
"""Where addresses are published and looked up: n0's DNS, files on this machine, nowhere."""

PSYCHE_RELAYS: Final = (
    "https://use1-1.relay.nousresearch.psyche.iroh.link/",
    "https://usw1-1.relay.nousresearch.psyche.iroh.link/",
)
"""Hosts of ``shared/network/src/lib.rs``."""

MAX_RELAYS: Final = 16
"""An endpoint measures the way to each of them again and again. Chosen arbitrarily."""

_NAMED: Final[Mapping[str, Relays]] = {
    "default": "default",
    "n0": "default",
    "none": "none",
    "disabled": "none",
    "psyche": PSYCHE_RELAYS,
}

_BETWEEN: Final = re.compile(r"[,\s]+")


def parse_relays(given: str | Iterable[str], *, name: str = "relay") -> Relays:
    """Relay servers as a user names them: one of the names above, or URLs, in one text or several.

    Args:
        given: what the user says.
        name: of the argument, option or variable, for messages.

    Raises:
        ConfigurationError: it is something else.
    """
    words = _words(given)
    if words is not None and len(words) == 1 and words[0].lower() in _NAMED:
        return _NAMED[words[0].lower()]
    if not words or not all(is_relay_url(word) for word in words):
        raise ConfigurationError(
            f"{name} must be default, psyche, none or a URL such as https://relay.example/ (or several URLs), "
            f"got {given!r}",
            name=name,
            value=given,
        )
    if len(words) > MAX_RELAYS:
        raise ConfigurationError(
            f"{name} may name at most {MAX_RELAYS} relay servers, got {len(words)}", name=name, value=given
        )
    return tuple(dict.fromkeys(map(_with_path, words)))


def parse_discovery(given: str | bool | None, relays: Relays, *, name: str = "discovery") -> Discovery:
    """Where an endpoint publishes its address and looks for others'.

    Args:
        given: ``"n0"``, ``"local"`` or ``"none"``; True and False for the first and the last of them; None for what
            suits the relay servers: n0's DNS with n0's relays and Psyche's, as Psyche's clients have it, else none.
        relays: the relay servers.
        name: of the argument, option or variable, for messages.

    Raises:
        ConfigurationError: it is something else.
    """
    if given is None:
        return "n0" if relays in ("default", PSYCHE_RELAYS) else "none"
    if isinstance(given, bool):
        return "n0" if given else "none"
    match given.strip().lower() if isinstance(given, str) else given:
        case "n0":
            return "n0"
        case "local":
            return "local"
        case "none":
            return "none"
    raise ConfigurationError(
        f"{name} must be n0 (the internet), local (files on this machine) or none, got {given!r}",
        name=name,
        value=given,
    )


def parse_external_addrs(given: str | Iterable[str] | None, *, name: str = "external_addr") -> tuple[SocketAddr, ...]:
    """Addresses at which others reach an endpoint though it does not know it: a forwarded port, a one-to-one NAT.

    Args:
        given: ``"203.0.113.7:4433"`` or ``"[2001:db8::7]:4433"``, or several; None for none.
        name: of the argument, option or variable, for messages.

    Raises:
        ConfigurationError: it is something else.
    """
    if given is None:
        return ()
    words = _words(given)
    try:
        found = tuple(SocketAddr.parse(word) for word in words or ())
    except ConfigurationError:
        found = ()
    if not found or not all(address.is_dialable and "%" not in str(address) for address in found):
        raise ConfigurationError(
            f"{name} must be the IP address and port at which others reach this machine, such as 203.0.113.7:4433 or "
            f"[2001:db8::7]:4433, got {given!r}",
            name=name,
            value=given,
        )
    if len(found) > MAX_ADDRESSES:
        raise ConfigurationError(
            f"{name} may name at most {MAX_ADDRESSES} addresses, got {len(found)}", name=name, value=given
        )
    return tuple(dict.fromkeys(found))


def _words(given: object) -> list[str] | None:
    """The texts in ``given``, taken apart; None if it is neither a text nor several."""
    if isinstance(given, bytes):
        return None
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [None]
    words: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            return None
        words += filter(None, _BETWEEN.split(text))
    return words


def _with_path(url: str) -> str:
    """``url`` as it stands in addresses of peers, where a path is at least a slash."""
    parts = urlsplit(url)
    return url if parts.path else parts._replace(path="/").geturl()


def is_relay_url(text: str) -> bool:
    """Whether an endpoint can be told to use a relay server of this name."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:  # the port is not a number, or the brackets do not hold an IPv6 address
        return False
    return (
        url.scheme in ("https", "http")
        and bool(url.hostname)
        and port != 0
        and "@" not in url.netloc
        and not url.fragment
        and text.isascii()
        and text.isprintable()
        and len(text) < MAX_RELAY_URL_BYTES
    )
