"""Who may connect to a node, and be dialled by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ....errors import ConfigurationError
from ...signing import PUBLIC_KEY_SIZE
from ..connection import Connection

__all__ = ["CLOSE_NOT_ALLOWED", "AllowList"]

# Code and words with which Psyche's clients turn away who is not in the run (`shared/network/src/allowlist.rs`).
CLOSE_NOT_ALLOWED: Final = 1
_NOT_ALLOWED: Final = b"not in allowlist"


class AllowList:
    """Endpoint ids, and protocols for which they do not count.

    Args:
        ids: those that may connect; None for everybody.

    Raises:
        ConfigurationError: one of them is not an endpoint id.
    """

    def __init__(self, ids: Iterable[bytes] | None) -> None:
        self._ids = None if ids is None else _checked(ids)
        self._exempt: set[bytes] = set()
        self._watchers: frozenset[bytes] = frozenset()
        self._watched: frozenset[bytes] = frozenset()

    @property
    def ids(self) -> frozenset[bytes] | None:
        """Those that may connect; None for everybody."""
        return self._ids

    def replace(self, ids: Iterable[bytes] | None) -> None:
        """Others from now on. Connections that are open are the caller's affair: see :meth:`turn_away`."""
        self._ids = None if ids is None else _checked(ids)

    def let_watch(self, ids: Iterable[bytes], alpns: Iterable[bytes]) -> None:
        """The owners of these keys may connect for these protocols alone, whatever else is allowed."""
        self._watchers, self._watched = _checked(ids), frozenset(alpns)

    def exempt(self, alpn: bytes) -> None:
        """Everybody may connect for ``alpn``, and be dialled."""
        self._exempt.add(alpn)

    def allows(self, peer: bytes, alpn: bytes) -> bool:
        """Whether the peer may have a connection for the protocol."""
        if peer in self._watchers:  # it may not take part, even while everybody else may
            return alpn in self._watched or alpn in self._exempt
        return self._ids is None or peer in self._ids or alpn in self._exempt

    def turn_away(self, connection: Connection) -> bool:
        """Closes the connection unless it is allowed, in the words of Psyche's clients; returns whether it did."""
        if self.allows(connection.remote_id, connection.alpn):
            return False
        connection.close(CLOSE_NOT_ALLOWED, _NOT_ALLOWED)
        return True


def _checked(ids: Iterable[bytes]) -> frozenset[bytes]:
    checked = frozenset(ids)
    for peer in checked:
        if not isinstance(peer, bytes) or len(peer) != PUBLIC_KEY_SIZE:
            raise ConfigurationError(
                f"an endpoint id has {PUBLIC_KEY_SIZE} bytes, got {peer!r}", name="allowed", value=peer
            )
    return checked
