"""Where clusters are reached: presets for those that everybody knows, and addresses of one's own. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from ..errors import ConfigurationError

__all__ = ["CLUSTERS", "Cluster", "cluster_of"]


@dataclass(frozen=True)
class Cluster:
    """Addresses of nodes.

    Attributes:
        rpc: for requests, in the order in which they are tried.
        websockets: for subscriptions.
    """

    rpc: tuple[str, ...]
    websockets: tuple[str, ...]


CLUSTERS: Final = {
    "devnet": Cluster(("https://api.devnet.solana.com",), ("wss://api.devnet.solana.com",)),
    "mainnet": Cluster(("https://api.mainnet-beta.solana.com",), ("wss://api.mainnet-beta.solana.com",)),
    "localhost": Cluster(("http://127.0.0.1:8899",), ("ws://127.0.0.1:8900",)),
}
"""The public nodes of each cluster, which limit how often they are asked, and the ports of Solana's own test
validator."""


def cluster_of(name: str, rpc: Sequence[str] = (), websockets: Sequence[str] = ()) -> Cluster:
    """A preset, or addresses of one's own in its place.

    A node with one address for both, as most providers have it, is found by the name of its scheme: ``wss`` for
    ``https``.

    Raises:
        ConfigurationError: there is no such preset, or an address is none.
    """
    _check("rpc", rpc, ("http", "https"))
    _check("websockets", websockets, ("ws", "wss"))
    if rpc:
        swapped = tuple(url.replace("http", "ws", 1) for url in rpc if url.startswith("http"))
        return Cluster(tuple(rpc), tuple(websockets) or swapped)
    preset = CLUSTERS.get(name)
    if preset is None:
        names = ", ".join(CLUSTERS)
        raise ConfigurationError(f"there is no cluster {name!r}, only {names}", name="cluster", value=name)
    return Cluster(preset.rpc, tuple(websockets) or preset.websockets)


def _check(name: str, urls: Sequence[str], schemes: tuple[str, str]) -> None:
    """Raises ConfigurationError unless each is an address; shows none, as many have a key in them."""
    if isinstance(urls, str):
        raise ConfigurationError(f"{name} takes a list of addresses, also of one", name=name)
    for number, url in enumerate(urls, 1):
        try:
            parts = urlsplit(url)
            is_one = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is no number, or brackets are open
            is_one = False
        if not is_one:
            raise ConfigurationError(
                f"{name} takes addresses that begin with {schemes[0]}:// or {schemes[1]}:// and name a host, and "
                f"number {number} is none",
                name=name,
            )
