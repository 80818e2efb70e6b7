"""Data and blobs for the tests."""

from __future__ import annotations

from dataclasses import dataclass

from distro_optim.comm.iroh.blobs.outboard import build_outboard

_PATTERN = bytes(range(251))


def sample(size: int) -> bytes:
    """Bytes 0, 1, ..., 250 repeated: the content behind the recorded responses."""
    return (_PATTERN * (size // 251 + 1))[:size]


@dataclass
class SampleBlob:
    """A complete blob in memory."""

    data: bytes

    def __post_init__(self) -> None:
        self.hash, self.outboard = build_outboard(self.data)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self.data[offset : offset + length]
