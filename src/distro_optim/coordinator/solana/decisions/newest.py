"""Which of many copies of an account is the newest. No I/O.

Copies come from several nodes, by subscription and by reading, late, doubled and out of order. The program counts its
changes in a nonce, which a new client version leaves as it is. A cluster can also take back what it had confirmed; then
a smaller nonce is right, and comes with a later slot.
"""

from __future__ import annotations

from typing import Final

from ...formats.account import VERSIONS, account_size, client_version_bytes, nonce_of

__all__ = ["NewestAccount"]

_SIZES: Final = frozenset(account_size(version) for version in VERSIONS)


class NewestAccount:
    """Remembers the newest copy.

    Attributes:
        data: its bytes; None before the first.
        slot: when a node had it.
    """

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.slot = 0

    def offer(self, data: bytes, slot: int) -> bool:
        """Whether this copy is newer than all before; it is kept then.

        Args:
            data: of the size of an account of any version; others are never newer.
            slot: that the node named with it.
        """
        if len(data) not in _SIZES:
            return False
        if self.data is not None and not self._is_newer(self.data, data, slot):
            if nonce_of(data) == nonce_of(self.data):
                self.slot = max(self.slot, slot)
            return False
        self.data, self.slot = data, max(slot, self.slot)
        return True

    def _is_newer(self, known: bytes, data: bytes, slot: int) -> bool:
        before, after = nonce_of(known), nonce_of(data)
        if after > before:
            return True
        if after == before:
            return slot >= self.slot and client_version_bytes(data) != client_version_bytes(known)
        return slot > self.slot
