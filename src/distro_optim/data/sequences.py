"""Where in raw token files a sequence lies. No I/O.

Files hold nothing but little-endian tokens. Each is cut in sequences of ``seq_len`` tokens from its start; they are
listed file by file, the list is shuffled if the run says so, and a data index is a place in it.

PsycheFoundation/psyche, ``shared/data-provider/src/{local,http}.rs``. Its two providers end a file differently: with
``S`` bytes a sequence, local files have the offsets 0, S, 2S, ... below ``length - S``, files behind HTTP those below
``length - S - token``. The last whole sequence of a file is therefore often left out, and the two count differently:
all clients of a run must read the same way. Files too short for a sequence, at which Psyche ends, have none here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..coordinator.model import Seeded, Shuffle, TokenSize
from ..coordinator.types import BatchId
from ..errors import ConfigurationError, InvalidDataError
from .shuffle import ChaCha8, permutation

__all__ = ["TOKEN_TYPES", "ByteRun", "SequenceTable", "decode_tokens"]

TOKEN_TYPES: Final[dict[TokenSize, np.dtype[Any]]] = {
    TokenSize.TWO_BYTES: np.dtype("<u2"),
    TokenSize.FOUR_BYTES: np.dtype("<u4"),
}


MAX_SHUFFLED: Final = 1 << 28
"""Sequences that can be shuffled: a gigabyte of memory, and more than half a trillion tokens of 2048 a sequence. A
server that lies about its sizes gets no further."""


@dataclass(frozen=True)
class ByteRun:
    """Sequences that follow each other in the data as in a file.

    Attributes:
        file: number of the file.
        offset: of the first byte.
        sequences: how many.
    """

    file: int
    offset: int
    sequences: int


class SequenceTable:
    """All sequences of some files, in the order of the run.

    Without a shuffle it takes memory by the file, with one four bytes a sequence.

    Args:
        sizes: bytes of each file.
        seq_len: tokens of a sequence.
        token_size: width of a token.
        shuffle: the order.
        spare_tokens: tokens that a file must have left behind a sequence: 0 on disk, 1 behind HTTP.

    Attributes:
        sequence_bytes: bytes of a sequence.

    Raises:
        ConfigurationError: too many sequences to be shuffled, or an argument makes no sense.
    """

    def __init__(
        self, sizes: Sequence[int], seq_len: int, token_size: TokenSize, shuffle: Shuffle, *, spare_tokens: int
    ) -> None:
        if seq_len < 1:
            raise ConfigurationError(f"seq_len must be at least 1, got {seq_len}", name="seq_len", value=seq_len)
        token_bytes = TOKEN_TYPES[token_size].itemsize
        self.sequence_bytes = seq_len * token_bytes
        needed = self.sequence_bytes + spare_tokens * token_bytes
        counts = (max(0, -((needed - size) // self.sequence_bytes)) for size in sizes)
        self._starts = [0, *accumulate(counts)]
        self._order: NDArray[np.uint32] | None = None
        if isinstance(shuffle, Seeded):
            if len(self) > MAX_SHUFFLED:
                raise ConfigurationError(
                    f"{len(self)} sequences are too many to shuffle, at most {MAX_SHUFFLED} can be: set shuffle to "
                    "DontShuffle and shuffle the files when they are made",
                    name="shuffle",
                )
            self._order = permutation(len(self), ChaCha8(shuffle.seed))

    def __len__(self) -> int:
        return self._starts[-1]

    def place(self, index: int) -> tuple[int, int]:
        """File and byte of the sequence with this data index, 0 to ``len() - 1``."""
        number = index if self._order is None else int(self._order[index])
        # The last file that starts at or before it: those without a sequence start where the next one does.
        file = bisect_right(self._starts, number) - 1
        return file, (number - self._starts[file]) * self.sequence_bytes

    def runs(self, batch: BatchId, *, most: int) -> list[ByteRun]:
        """Where the sequences of ``batch`` are, in its order; neighbours in a file together, at most ``most`` of them.

        With a shuffle neighbours are rare; without one a batch is one run, or two where a file ends.
        """
        found: list[ByteRun] = []
        for index in range(batch.start, batch.end + 1):
            file, offset = self.place(index)
            last = found[-1] if found else None
            if (
                last is not None
                and last.file == file
                and offset == last.offset + last.sequences * self.sequence_bytes
                and last.sequences < most
            ):
                found[-1] = ByteRun(file, last.offset, last.sequences + 1)
            else:
                found.append(ByteRun(file, offset, 1))
        return found


def decode_tokens(raw: bytes | memoryview, token_size: TokenSize) -> NDArray[np.int32]:
    """``(tokens,) int32`` of raw bytes; those from 2**31 on become negative, as in Psyche, and are refused later.

    Raises:
        InvalidDataError: the bytes are not a whole number of tokens.
    """
    dtype = TOKEN_TYPES[token_size]
    if len(raw) % dtype.itemsize:
        raise InvalidDataError(f"{len(raw)} bytes are not a whole number of tokens of {dtype.itemsize} bytes")
    return np.frombuffer(raw, dtype=dtype).astype(np.int32)
