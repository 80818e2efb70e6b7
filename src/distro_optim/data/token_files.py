"""Raw token files on the own disk, memory-mapped.

PsycheFoundation/psyche, ``shared/data-provider/src/local.rs``: the files ``*.npy``, ``*.bin`` and ``*.ds`` of a folder
are little-endian tokens of two or four bytes without a header; :mod:`.sequences` has the order. Psyche takes the files
in the order in which the system lists them, which another disk may do differently; here they are sorted by name.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from typing_extensions import override

from ..coordinator.model import DontShuffle, Shuffle, TokenSize
from ..coordinator.types import BatchId
from ..errors import ConfigurationError, DataUnavailableError, InvalidDataError
from .provider import TokenProvider, TokenSequence
from .sequences import TOKEN_TYPES, SequenceTable, decode_tokens
from .sidecar import read_sidecar

__all__ = ["EXTENSIONS", "TokenFiles", "find_token_files", "token_size_on_disk"]

EXTENSIONS: Final = frozenset({".npy", ".bin", ".ds"})

_NUMPY_MAGIC: Final = b"\x93NUMPY"
"""How a file that ``numpy.save`` wrote begins; Psyche's ``.npy`` files do not."""


class TokenFiles(TokenProvider):
    """The sequences of a folder of token files, or of one file.

    Args:
        path: the folder, the file, or files in their order.
        token_size: width of a token.
        seq_len: tokens of a sequence.
        shuffle: the order.
        vocab_size: tokens the model knows; None leaves that unchecked.
        spare_tokens: that a file must have left behind a sequence; 1 counts as for files behind HTTP.

    Raises:
        ConfigurationError: the folder cannot be read or has no sequence.
        InvalidDataError: a file is cut, or is none of raw tokens of this width.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[Path],
        token_size: TokenSize,
        seq_len: int,
        shuffle: Shuffle = DontShuffle(),  # noqa: B008 - immutable
        *,
        vocab_size: int | None = None,
        spare_tokens: int = 0,
    ) -> None:
        super().__init__(seq_len, vocab_size=vocab_size)
        self._token_size = token_size
        self._paths = find_token_files(path) if isinstance(path, str | os.PathLike) else list(path)
        try:
            sizes = [found.stat().st_size for found in self._paths]
            for found, size in zip(self._paths, sizes, strict=True):
                _check_file(found, size, token_size)
            self._table = SequenceTable(sizes, seq_len, token_size, shuffle, spare_tokens=spare_tokens)
            # An empty file cannot be mapped, nor has it a sequence to be read.
            self._maps = {number: _mapped(self._paths[number]) for number, size in enumerate(sizes) if size}
        except OSError as error:
            raise ConfigurationError(f"cannot read token files in {path}: {error}", name="dir", value=path) from None
        if not len(self._table):
            self.close()
            raise ConfigurationError(
                f"no file in {path} has a sequence of {seq_len} tokens (looked for {', '.join(sorted(EXTENSIONS))}; "
                "the last sequence of a file does not count)",
                name="dir",
                value=path,
            )

    def __len__(self) -> int:
        """Sequences."""
        return len(self._table)

    @property
    @override
    def num_sequences(self) -> int:
        return len(self._table)

    @override
    def close(self) -> None:
        super().close()
        for mapped in self._maps.values():
            mapped.close()

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        size = self._table.sequence_bytes
        samples = []
        for run in self._table.runs(batch, most=len(batch)):
            end = run.offset + run.sequences * size
            mapped = self._maps[run.file]
            # Memory behind the end of a file that was cut in the meantime ends the process when it is touched.
            try:
                length = mapped.size()
                raw = mapped[run.offset : end] if end <= length else b""
            except ValueError:
                raise DataUnavailableError("this provider of training data was closed while it read") from None
            if end > length:
                raise InvalidDataError(
                    f"{self._paths[run.file]} was cut while it was in use: it has {length} bytes, {end} are needed"
                )
            tokens = decode_tokens(raw, self._token_size)
            samples += [TokenSequence(one) for one in tokens.reshape(run.sequences, self.seq_len)]
        return samples


def find_token_files(path: str | os.PathLike[str]) -> list[Path]:
    """The token files of a folder in the order of their names, or ``path`` itself if it is a file.

    Raises:
        ConfigurationError: neither can be read.
    """
    root = Path(path)
    try:
        if root.is_file():
            return [root]
        return sorted(found for found in root.iterdir() if found.suffix in EXTENSIONS and found.is_file())
    except OSError as error:
        raise ConfigurationError(f"cannot read token files in {path}: {error}", name="dir", value=path) from None


def token_size_on_disk(path: str | os.PathLike[str]) -> TokenSize | None:
    """The width of the tokens of a folder or a file, where the files beside them say it.

    Raises:
        ConfigurationError: the folder cannot be read.
        InvalidDataError: the files are of several widths.
    """
    sizes = {sidecar.token_size for found in find_token_files(path) if (sidecar := read_sidecar(found)) is not None}
    if len(sizes) > 1:
        raise InvalidDataError(
            f"the token files in {path} have tokens of two and of four bytes; put them in two folders"
        )
    return sizes.pop() if sizes else None


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_file(path: Path, size: int, token_size: TokenSize) -> None:
    """Refuses a file that was cut or never was one of such tokens."""
    width = TOKEN_TYPES[token_size].itemsize
    if size % width:
        raise InvalidDataError(
            f"{path} is cut, or its tokens are not of {width} bytes: its {size} bytes are not a whole number of them"
        )
    with open(path, "rb") as file:
        start = file.read(len(_NUMPY_MAGIC))
    if start == _NUMPY_MAGIC:
        raise InvalidDataError(
            f"{path} begins with the header of numpy.save, which would be read as tokens: write raw tokens, as "
            "array.tofile does"
        )
    sidecar = read_sidecar(path)
    if sidecar is None:
        return
    if sidecar.token_size is not token_size:
        raise InvalidDataError(
            f"{path} has tokens of {TOKEN_TYPES[sidecar.token_size].itemsize} bytes, as the file beside it says; "
            f"they would be read as tokens of {width}"
        )
    if size != sidecar.tokens * width:
        raise InvalidDataError(
            f"{path} is cut: it has {size // width} tokens, and {sidecar.tokens} as the file beside it says"
        )
