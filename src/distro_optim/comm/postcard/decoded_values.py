"""Values that were decoded before, found again by their bytes. No I/O."""

from __future__ import annotations

from typing import Any, Final

from ...buffer import Reader

__all__ = ["HEAD", "MAX_DECODED", "MAX_DECODED_BYTES", "DecodedValues"]

HEAD: Final = 64
"""Bytes by which a value is looked up, if its class does not say how many. Values that begin alike, which is allowed,
take each other's place."""

MAX_DECODED: Final = 512
"""Values of a type. A state of the coordinator has at most 128 reports, of some 600 bytes each."""

MAX_DECODED_BYTES: Final = 1 << 20
"""From which values of a type were decoded. Four rounds of a state have at most 310 kB."""


class DecodedValues:
    """The latest values of one type; what they were decoded from is compared to the last byte.

    A state of the coordinator repeats the reports of four rounds, thousands of random numbers, and comes several times
    in a round: to read each report once is most of what a client saves.

    Args:
        head: bytes by which a value is looked up.
    """

    def __init__(self, head: int = HEAD) -> None:
        self._head = head
        self._known: dict[bytes, tuple[bytes, Any]] = {}
        self._bytes = 0

    def pull(self, reader: Reader) -> Any | None:
        """The next value, if its bytes are those of one that is remembered; otherwise None, and nothing is taken."""
        left = reader.peek()
        known = self._known.get(bytes(left[: self._head]))
        if known is None or left[: len(known[0])] != known[0]:
            return None
        reader.pull_bytes(len(known[0]))
        return known[1]

    def remember(self, data: bytes, value: Any) -> None:
        """``value`` was decoded from ``data``; it must never change. One shorter than ``head`` is not kept."""
        if len(data) < self._head:
            return
        self._bytes += len(data)
        if len(self._known) >= MAX_DECODED or self._bytes > MAX_DECODED_BYTES:
            self._known.clear()
            self._bytes = len(data)
        self._known[data[: self._head]] = (data, value)
