"""A ``data.toml``: the token files that a data server hands out, in Psyche's form.

PsycheFoundation/psyche, ``architectures/centralized/server/src/app.rs`` and ``config/*/data.toml``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..comm.postcard import U64, Fixed
from ..coordinator.formats.text import from_toml
from ..coordinator.model import Seeded, TokenSize
from ..errors import ConfigurationError, ProtocolError
from .token_files import TokenFiles

__all__ = ["DataServerInfo", "read_data_file"]


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


def read_data_file(path: str | os.PathLike[str], *, vocab_size: int | None = None) -> TokenFiles:
    """Opens what a ``data.toml`` describes.

    Raises:
        ConfigurationError: it is wrong, or there are no data; the message names file and field.
        InvalidDataError: the data are wrong.
    """
    try:
        info = from_toml(DataServerInfo, Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}", name="data", value=path) from None
    except (UnicodeDecodeError, ProtocolError) as error:
        raise ConfigurationError(f"{path}: {error}", name="data", value=path) from None
    folder = Path(path).parent / info.dir
    return TokenFiles(folder, info.token_size, info.seq_len, Seeded(info.shuffle_seed), vocab_size=vocab_size)
