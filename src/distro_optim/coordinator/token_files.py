"""Training data in raw token files, in the order in which Psyche's data server numbers it.

PsycheFoundation/psyche, ``shared/data-provider/src/local.rs``: the files ``*.npy``, ``*.bin`` and ``*.ds`` of a folder
are little-endian tokens of two or four bytes without a header. Each is cut in sequences of ``seq_len`` tokens, the last
one left out where the length is a multiple; the list of all is shuffled, and a data index is a place in it.

Psyche takes the files in the order in which the system lists them, which another disk may do differently; here they
are sorted by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..comm.postcard import U64, Fixed
from ..errors import ConfigurationError, ProtocolError
from .model import DontShuffle, Seeded, Shuffle, TokenSize
from .shuffle import ChaCha8, slice_shuffle
from .text import from_toml
from .types import BatchId

__all__ = ["DataServerInfo", "TokenFiles", "read_data_file"]

EXTENSIONS: Final = frozenset({".npy", ".bin", ".ds"})

_TOKEN_TYPES: Final[dict[TokenSize, np.dtype[Any]]] = {
    TokenSize.TWO_BYTES: np.dtype("<u2"),
    TokenSize.FOUR_BYTES: np.dtype("<u4"),
}


@dataclass(frozen=True)
class DataServerInfo:
    """A ``data.toml``.

    Attributes:
        dir: folder of the token files, seen from the file's own.
        seq_len: tokens of a sequence.
        shuffle_seed: 32 numbers below 256.
    """

    dir: str
    token_size: TokenSize
    seq_len: U64
    shuffle_seed: Annotated[bytes, Fixed(32)]


def read_data_file(path: str | os.PathLike[str]) -> TokenFiles:
    """Opens what a ``data.toml`` describes.

    Raises:
        ConfigurationError: it is wrong, or there are no data; the message names file and field.
    """
    try:
        info = from_toml(DataServerInfo, Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}", name="data", value=path) from None
    except (UnicodeDecodeError, ProtocolError) as error:
        raise ConfigurationError(f"{path}: {error}", name="data", value=path) from None
    return TokenFiles(Path(path).parent / info.dir, info.token_size, info.seq_len, Seeded(info.shuffle_seed))


class TokenFiles:
    """The sequences of a folder. Reading is safe from several threads.

    Args:
        directory: where the files are.
        token_size: bytes of a token.
        seq_len: tokens of a sequence.
        shuffle: the order.

    Raises:
        ConfigurationError: the folder has no sequence.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        token_size: TokenSize,
        seq_len: int,
        shuffle: Shuffle = DontShuffle(),  # noqa: B008 - immutable
    ) -> None:
        if seq_len < 1:
            raise ConfigurationError(f"seq_len must be at least 1, got {seq_len}", name="seq_len", value=seq_len)
        self.seq_len = seq_len
        self._dtype = _TOKEN_TYPES[token_size]
        size = seq_len * self._dtype.itemsize
        try:
            paths = sorted(path for path in Path(directory).iterdir() if path.suffix in EXTENSIONS and path.is_file())
            self._files = [np.memmap(path, dtype=np.uint8, mode="r") for path in paths if path.stat().st_size > size]
        except OSError as error:
            raise ConfigurationError(f"cannot read token files in {directory}: {error}", name="dir") from None
        # As Psyche has it: offsets 0, S, 2S, ... that lie below the file's length minus S.
        places = [
            (number, offset) for number, file in enumerate(self._files) for offset in range(0, len(file) - size, size)
        ]
        if not places:
            raise ConfigurationError(
                f"no file in {directory} has a sequence of {seq_len} tokens (looked for "
                f"{', '.join(sorted(EXTENSIONS))}; the last sequence of a file does not count)",
                name="dir",
                value=directory,
            )
        if isinstance(shuffle, Seeded):
            slice_shuffle(places, ChaCha8(shuffle.seed))
        self._places = places

    def __len__(self) -> int:
        """Sequences."""
        return len(self._places)

    def has(self, batch: BatchId) -> bool:
        """Are all of these indices there?"""
        return batch.end < len(self._places)

    def read(self, batch: BatchId) -> list[NDArray[np.int32]]:
        """``(seq_len,) int32`` tokens of each index of the interval.

        Raises:
            IndexError: beyond the end.
        """
        return [self._sequence(index) for index in range(batch.start, batch.end + 1)]

    def _sequence(self, index: int) -> NDArray[np.int32]:
        number, offset = self._places[index]
        raw = self._files[number][offset : offset + self.seq_len * self._dtype.itemsize]
        return np.frombuffer(raw.tobytes(), dtype=self._dtype).astype(np.int32)
